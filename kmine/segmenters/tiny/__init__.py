"""kmine's own small promptable segmenter, shipped with its weights; it segments a crop around each box."""

from pathlib import Path

SHIPPED = Path(__file__).with_name("tiny.safetensors")
"""The default weights, part of the package."""
