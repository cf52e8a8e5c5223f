"""Benchmarks: load, workloads and results."""
