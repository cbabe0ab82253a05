"""Other libraries' models on these kernels. Nothing here is imported before it is asked for."""
