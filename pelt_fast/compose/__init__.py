"""What is done with whole methods: folded into the base, or several of them under names."""
