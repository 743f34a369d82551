"""A low-rank update beside a frozen layer that computes its own product (quantised layers)."""
