"""A frozen feed-forward block and its parallel adapter as one wider block (docs/maths.md#i3)."""
