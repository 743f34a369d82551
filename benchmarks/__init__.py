"""Benchmarks: one file per subject, results in ``results/``."""
