"""Segment Anything: the only folder that imports `segment_anything`."""
