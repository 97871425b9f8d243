"""kmine's own small promptable segmenter, shipped with its weights."""

from pathlib import Path

SHIPPED = Path(__file__).with_name("tiny.safetensors")
"""Default weights of `tiny`; here because `kmine.segmenters.tiny.weights` loads torch."""
