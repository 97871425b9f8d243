"""Procedural images with true masks: polyps, CT slices, chest X-rays."""
