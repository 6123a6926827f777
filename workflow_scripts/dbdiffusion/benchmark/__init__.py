"""Baselines, metrics and ceilings."""
