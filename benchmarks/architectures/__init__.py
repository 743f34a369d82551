"""Every family of transformers that can be built here, tiny, under the methods."""
