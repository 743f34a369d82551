"""How a method gets into a model and out of it again, and what is said about it there."""
