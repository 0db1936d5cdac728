"""Activations: calibration text, the reference forward one layer at a time, statistics, evaluation."""
