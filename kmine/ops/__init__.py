"""Pure functions of arrays: masks, metrics, statistics, calibration curves."""
