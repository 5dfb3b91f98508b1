"""Evaluation: OOD, calibration, selective prediction, retrieval, conformal sets, probes, shift, ambiguity, transfer, reports."""
