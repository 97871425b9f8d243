"""Knowledge mining (arXiv 2503.06816): probs -> prompts -> candidates -> decisions -> pseudo masks."""
