"""Evaluation: OOD, calibration, selective prediction, ambiguity; metrics with intervals, and plots."""
