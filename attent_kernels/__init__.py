"""Kernels and their launchers: tensors in, tensors out, no policy. ``attent`` imports this package, not vice versa."""
