"""Time and memory of fasthyper beside the usual ways: `python -m benchmarks --help`, `pytest benchmarks`."""
