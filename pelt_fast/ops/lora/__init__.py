"""LoRA on a linear layer (paper equation 6)."""
