"""Checks of images and masks: intensity, duplicates, alignment."""
