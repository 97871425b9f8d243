"""kmine: semi-supervised medical image segmentation by knowledge mining."""

__version__ = "0.1.0"
