"""Fits the one-pass predictor: losses, metrics, baselines, Lightning module, calibration, figures."""
