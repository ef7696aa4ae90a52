"""Benchmarks: ratios within one run, contenders interleaved, results committed with their provenance."""
