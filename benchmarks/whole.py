"""The whole training step that the model benchmark times, and its models."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .text import batch as row_lengths


@dataclass(frozen=True)
class Trained:
    """A model that trains. ``trained``: its trainable tensors under the names they have in the
    model pelt_fast injected, or None where another function is trained (``note`` says which).
    ``to_embeddings``: nothing trains, backward goes to the embeddings. ``save`` writes the
    user's files to a folder. ``opaque``: compiled, so that flops and saved tensors are not seen."""

    name: str
    model: nn.Module
    trained: dict[str, Tensor] | None
    save: Callable | None = None
    around: Callable = contextlib.nullcontext
    to_embeddings: bool = False
    note: str = ""
    opaque: bool = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the optimizer."""
        return [p for p in self.model.parameters() if p.requires_grad]


def batches(model: nn.Module, rows: int, source: int, target: int, texts, count: int, device) -> \
        list[dict[str, Tensor]]:  # fmt: skip
    """Batches of random tokens with real lengths, padded right: labels of ``target`` tokens for an
    encoder-decoder, of one class a row for a classifier, of the tokens for a decoder."""
    generator = torch.Generator().manual_seed(0)
    found = []
    lengths = row_lengths(rows, source, target, texts)
    for _ in range(count):
        order = torch.randperm(rows, generator=generator)
        found.append(_batch(model, lengths[order], source, target, generator, device))
    return found


def _batch(model, lengths, source, target, generator, device) -> dict[str, Tensor]:
    vocabulary, pad = model.config.vocab_size, model.config.pad_token_id
    mask = torch.arange(source) < lengths[:, :1]
    ids = torch.randint(4, vocabulary, mask.shape, generator=generator)
    found = dict(input_ids=ids.where(mask, pad), attention_mask=mask.long())
    if model.config.is_encoder_decoder:
        labels = torch.randint(4, vocabulary, (len(lengths), target), generator=generator)
        found["labels"] = labels.where(torch.arange(target) < lengths[:, 1:], -100)
    elif hasattr(model, "classifier"):
        found["labels"] = torch.randint(0, 3, (len(lengths),), generator=generator)
    else:
        found["labels"] = ids.where(mask, -100)
    return {name: t.to(device) for name, t in found.items()}


def tokens(batch: dict[str, Tensor]) -> int:
    """Real tokens, padding left out, of source and target."""
    count = int(batch["attention_mask"].sum())
    labels = batch["labels"]
    is_target = labels.shape != batch["attention_mask"].shape and labels.dim() == 2
    return count + (int((labels != -100).sum()) if is_target else 0)


def loss_of(trained: Trained, batch: dict[str, Tensor]) -> Tensor:
    """The loss; of a frozen model as a function of its embeddings."""
    if not trained.to_embeddings:
        return trained.model(**batch).loss
    model, given = trained.model, dict(batch)
    embed = model.get_input_embeddings()
    given["inputs_embeds"] = embed(given.pop("input_ids")).detach().requires_grad_()
    if model.config.is_encoder_decoder:
        labels = given["labels"]
        start = labels.new_full((labels.shape[0], 1), model.config.decoder_start_token_id)
        ids = torch.cat([start, labels[:, :-1]], 1).clamp(min=model.config.pad_token_id)
        given["decoder_inputs_embeds"] = embed(ids).detach().requires_grad_()
    return model(**given).loss


def stepper(trained: Trained, batches: list[dict[str, Tensor]]) -> Callable[[int], None]:
    """A whole training step: forward, backward in the calling thread (as in our Trainer), AdamW on
    the trained parameters."""
    trained.model.train()
    parameters = trained.parameters
    optimizer = torch.optim.AdamW(parameters, lr=1e-5) if parameters else None

    def step(i: int) -> None:
        with trained.around(), torch.autograd.set_multithreading_enabled(False):
            loss_of(trained, batches[i % len(batches)]).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def outcome(trained: Trained, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits and the gradients of the trained parameters, dropout off."""
    trained.model.eval()
    trained.model.zero_grad()
    with trained.around():
        out = trained.model(**batch)
        out.loss.backward()
    found = {"logits": out.logits.detach()}
    for name, tensor in trained.trained.items():
        found[name] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    trained.model.zero_grad()
    return found


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Its trainable tensors by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def randomise(model: nn.Module) -> nn.Module:
    """Give every trainable tensor random values: an update of zero would hide errors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * noise.to(parameter.device, parameter.dtype))
    return model


def named(model: nn.Module, wanted: nn.Module) -> str:
    """The name of a module in a model."""
    return next(name for name, module in model.named_modules() if module is wanted)
