"""Scored attention in Triton: output, losses, scores and the choice in one launch, and its gradients."""
