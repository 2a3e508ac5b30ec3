"""Ways to compute attention: one file a package that has kernels for it."""
