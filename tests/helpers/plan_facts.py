"""Facts of data, machines and speeds, for plans that measure nothing."""

from __future__ import annotations

from kmine.plan.fingerprint import Fingerprint
from kmine.plan.machine import Machine
from kmine.plan.probe import SegmenterSpeed, Speed

DATA = Fingerprint(
    num_images=300,
    num_masks=300,
    num_image_labels=0,
    num_labeled=20,
    num_unlabeled=175,
    num_val=30,
    num_groups=297,
    num_classes=2,
    height=530,
    width=620,
    aspect_low=1.0,
    aspect_high=1.3,
    is_grey=False,
    num_objects=1.0,
    object_px=200.0,
    small_object_px=60.0,
    read_seconds=0.01,
)
CPU = Machine("cpu", False, 2, 16.0, 0.0, "32")
GPU = Machine("H100", True, 16, 64.0, 79.0, "bf16")
SPEED = Speed(96, 8, 0.1, 0.01, 1.0)
TINY = SegmenterSpeed(0.0, 0.01, 0.1, 200)
