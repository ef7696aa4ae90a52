"""Linear cross-entropy in Triton: losses and gradient norms of ``hidden @ weight.T`` without logits in memory."""
