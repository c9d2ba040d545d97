"""Benchmark cases, baselines and measuring. Needs nothing beyond torch."""
