"""Speed beside PyTorch's: `python -m benchmarks.ratio`, or `pytest benchmarks` for pytest-benchmark's statistics."""
