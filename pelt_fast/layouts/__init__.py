"""What a model looks like: its description, the table of known models, drafts for others."""
