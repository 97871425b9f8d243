"""Procedural images with exact masks: polyps, CT slices, chest X-rays."""
