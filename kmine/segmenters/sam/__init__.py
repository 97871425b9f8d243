"""Segment Anything; the sole home of segment_anything."""
