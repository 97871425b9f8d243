"""Training, inference and evaluation of the local model, shared by all methods."""
