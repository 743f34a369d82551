"""Loss, perplexity and token accuracy, exact over all tokens that are learned."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .tokens import IGNORED


@torch.no_grad()
def token_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """For each row the sum of the losses, the number of right tokens, and of tokens, (B, 3).

    logits (B, T, V), labels (B, T): position t predicts label t + 1. Of one row at a
    time the learned logits are made fp32. Under 16-bit autocast accelerate has made fp32 logits of
    all rows before.
    """
    return torch.stack([_of_row(row[:-1], wanted[1:]) for row, wanted in zip(logits, labels)])


def _of_row(logits: Tensor, labels: Tensor) -> Tensor:
    learned = labels != IGNORED
    logits, labels = logits[learned].float(), labels[learned]
    losses = F.cross_entropy(logits, labels, reduction="none").double()
    right = (logits.argmax(-1) == labels).double()
    return torch.stack([losses.sum(), right.sum(), right.new_tensor(float(len(labels)))])


def scores(prediction) -> dict[str, float]:
    """The scores of a Trainer's prediction, whose predictions are the rows of :func:`token_sums`:
    the mean loss, its exponential, and the share of right tokens in per cent."""
    loss, right, tokens = prediction.predictions.sum(0).tolist()
    mean = loss / tokens
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return {"loss": mean, "perplexity": perplexity, "token_accuracy": 100 * right / tokens}
