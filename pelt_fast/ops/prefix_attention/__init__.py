"""Attention with a trainable prefix beside its context (paper equation 7)."""
