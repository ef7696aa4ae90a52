"""Kernels and their launchers: tensors in, tensors out, no policy. ``attent`` imports this package, never the other way."""
