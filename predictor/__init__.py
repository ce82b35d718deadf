"""Fits the one-pass predictor: losses, metrics, baselines, Lightning module, checkpoints, calibration."""
