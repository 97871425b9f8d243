"""Local models: small networks that predict without the segmenter. Importing this package does not load torch."""

from __future__ import annotations

ARCHITECTURES = {"unet": "Unet", "unetpp": "UnetPlusPlus", "dpt": "DPT", "sks": None}
"""Name in a config -> class of segmentation-models-pytorch; None for kmine's own network."""
