"""The gate calibrated on the labeled images by cross-fitting."""
