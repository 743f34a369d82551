"""Whole methods: folded into the base, or several of them in one model under names."""
