"""Stages: typed inputs to typed outputs, no file handling."""
