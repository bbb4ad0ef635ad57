"""Benchmarks of fasthyper and its peers: `python -m benchmarks --help`, `pytest benchmarks`."""
