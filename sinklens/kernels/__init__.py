"""Attention statistics as pure functions of q, k, v. Knows torch, knows nothing of models or transformers."""
