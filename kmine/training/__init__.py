"""Training and inference of the local model, shared by all methods."""
