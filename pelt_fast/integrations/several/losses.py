"""The loss of each method's rows, as the model's own loss is of these rows alone."""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
TOLERANCE = 1e-3  # of one loss computed twice; one of another kind is further away
Loss = Callable[[Tensor, Tensor, object], Tensor]  # of logits, labels and the model's config


def _tokens(logits: Tensor, labels: Tensor, config) -> Tensor:
    """Position t predicts label t."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def _next_tokens(logits: Tensor, labels: Tensor, config) -> Tensor:
    """Position t predicts label t + 1."""
    return _tokens(logits, F.pad(labels, (0, 1), value=IGNORED)[..., 1:], config)


def _classes(logits: Tensor, labels: Tensor, config) -> Tensor:
    """Of a sequence: regression, one label or several, as ``config.problem_type`` says."""
    if config.problem_type == "regression":
        return F.mse_loss(logits.reshape(labels.shape), labels)
    if config.problem_type == "single_label_classification":
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    return F.binary_cross_entropy_with_logits(logits, labels)


def _wide(loss: Loss, logits: Tensor, labels: Tensor, config) -> Tensor:
    """A loss in fp32, of logits with fewer bits."""
    return loss(logits.float(), labels, config)


def loss_of(model: nn.Module, batch: dict, config) -> Loss:
    """The loss that the model has for a batch with labels: the one of ours that gives the model's
    own number. Dropouts are off.

    Raises ValueError if none does.
    """
    with torch.no_grad(), _evaluated(model):
        outputs = model(**batch)
        if "labels" not in batch or outputs.loss is None:
            raise ValueError("data_collator must give labels, and the model a loss: it has none")
        errors = {
            loss: _error(loss(outputs.logits, batch["labels"], config), outputs.loss)
            for loss in _candidates(outputs.logits, batch["labels"], config)
        }
    nearest = min(errors, key=lambda loss: errors[loss])
    if errors[nearest] > TOLERANCE:
        raise ValueError(
            f"the loss of {type(model).__name__} is not known here: it must be the mean over"
            " sequences of a class, several or a number, or over tokens of each one or the next"
        )
    return nearest


def _candidates(logits: Tensor, labels: Tensor, config) -> Sequence[Loss]:
    """The losses that are possible, the more likely first."""
    found = [_classes]
    if logits.dim() == 3 and labels.shape == logits.shape[:2]:
        found = [_next_tokens, _tokens]
        if config.is_encoder_decoder:
            found.reverse()
    few_bits = logits.dtype.itemsize < 4
    return [*(partial(_wide, loss) for loss in found if few_bits), *found]


def _error(ours: Tensor, own: Tensor) -> float:
    """The relative difference of two losses; 0 if neither is finite."""
    pair = torch.stack([ours.double(), own.double()])
    if not pair.isfinite().any():
        return 0.0
    error = float((pair[0] - pair[1]).abs() / pair[1].abs().clamp(min=1))
    return error if math.isfinite(error) else math.inf


@contextmanager
def _evaluated(model: nn.Module):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def without_labels(model: nn.Module, batch: dict) -> dict:
    """What a forward reads that gives logits and no loss. A decoder that makes its input from the
    labels gets that input."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    own = {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys()
    makes = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if model.config.is_encoder_decoder and not own and batch["labels"].dim() == 2:
        if makes is None:
            return batch
        inputs["decoder_input_ids"] = makes(labels=batch["labels"])
    return inputs


def losses_of(
    loss: Loss, logits: Tensor | list[Tensor], labels: Tensor, counts: Sequence[int], config
) -> list[Tensor]:
    """The loss of each of the parts of a batch, which have these numbers of rows. ``logits`` is a
    list of rows where methods have unlike numbers of classes."""
    if isinstance(logits, list):
        rows = iter(logits)
        each = [torch.stack([next(rows) for _ in range(count)]) for count in counts]
    else:
        each = logits.split(list(counts))
    parts = zip(each, labels.split(list(counts)), strict=True)
    return [loss(own, wanted, config) for own, wanted in parts]
