"""Checks of images and masks: statistics, duplicates, pairing, intensity."""
