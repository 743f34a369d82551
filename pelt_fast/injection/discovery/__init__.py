"""The layout of a model that has no row: found from one forward, and proved before it is used."""
