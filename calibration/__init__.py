"""Run the model: calibration text, the reference forward layer by layer, statistics, evaluation."""
