"""Models built on these kernels, consumers like any other. Nothing here is imported before it is asked for."""
