"""Benchmarks, each run as a module from the project's directory: `python -m benchmarks.bench_decode`."""
