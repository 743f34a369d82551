"""One schema per op in ``torch.library`` and the autograd Functions around them."""
