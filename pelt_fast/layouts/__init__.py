"""What a model looks like: the words for it, the table of known models, the search for others."""
