"""`kmine predict`: a trained local model applied to new images, exported, described. Nothing here imports torch before
a run's own network is opened, so an ONNX file is predicted from without it."""
