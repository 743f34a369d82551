"""Several named methods of one model, each trained by a run of its own, in the same steps."""
