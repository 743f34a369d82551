"""Tasks: data and training on top of transformers' Trainer."""
