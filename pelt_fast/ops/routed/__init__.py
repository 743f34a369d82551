"""Low-rank updates of many methods in one batch: each row runs under its own method, or none."""
