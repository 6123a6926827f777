"""Debiased estimates, their errors, tests, calls and calibration."""
