"""Triton kernels of linear cross-entropy: tensors in, tensors out."""
