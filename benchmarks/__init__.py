"""What GPUs would do (`python -m benchmarks.gpu_static`), and pytest-benchmark's statistics (`pytest benchmarks`)."""
