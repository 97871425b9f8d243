"""The segmenter fine-tuned on the labeled images before it is prompted."""
