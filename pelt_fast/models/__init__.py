"""From a transformers model to its sites: the architecture table, injection, checkpoints."""
