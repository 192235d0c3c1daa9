"""Other libraries' models on the fused kernels: one module a library, which imports it only when it is called."""
