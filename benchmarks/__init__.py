"""Measurements: ``pytest benchmarks --benchmark-only``, the bars, results of named hardware and their publication."""
