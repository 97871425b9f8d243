"""Local models: small networks that run without the large one. Importing this package costs no torch."""

from __future__ import annotations

ARCHITECTURES = {"unet": "Unet", "unetpp": "UnetPlusPlus", "sks": None}
"""Name in a config -> class of segmentation-models-pytorch, None where the network is kmine's own."""
