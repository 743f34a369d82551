"""The bottleneck adapter, sequential and parallel (paper equation 4, section 3.3)."""
