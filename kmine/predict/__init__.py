"""`kmine predict`: a trained local model applied to new images, exported, described.

torch is imported only when the network of a run is loaded: predicting from an ONNX file works without it.
"""
