"""Before round 1: what is learnt from the labels beside the local model. The segmenter, and what the gate goes by."""
