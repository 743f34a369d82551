"""A causal language model on rows of your own: conversations, completions or plain text."""
