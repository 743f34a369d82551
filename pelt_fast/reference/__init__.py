"""The specification: every op in plain PyTorch, forward and hand-derived backward.

Nothing here is fast and nothing here imports the rest of the package. Each backend is judged
against these functions, and an input no backend supports runs on them.
"""
