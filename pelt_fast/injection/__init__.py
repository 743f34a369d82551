"""How a method is put into a model and taken out again, and reports on an injected method."""
