"""What of a recipe fits into the memory that is free: batch, checkpointing, quantised weights."""

import importlib.util
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch

import pelt_fast

from .estimate import estimate, free_memory
from .found_layout import NotKnown, found_layout
from .kinds import auto_class
from .loading import load_config
from .recipe import Recipe
from .registry import task_of
from .say import unsaid

SHARE = 0.9  # of the free memory: the estimate is rough
GB = 1e9


@dataclass(frozen=True)
class Fit:
    """A recipe that fits, the bytes that it needs, and those that are free (None: not known)."""

    recipe: Recipe
    needed: int
    free: int | None
    device: str


def fitted(recipe: Recipe, config=None) -> Fit:
    """The recipe with the first of the settings that fit here: the whole batch, a smaller one with
    more accumulation, checkpointing, and on a GPU nf4 weights. ``config`` is the model's; None
    loads it. ValueError when none does."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    free, model = free_memory(torch.device(kind)), without_memory(recipe, config)
    needed = 0
    for candidate in _candidates(recipe, kind):
        needed = estimate(model, candidate, kind).bytes
        if free is None or needed <= SHARE * free:
            return Fit(candidate, needed, free, kind)
    raise ValueError(
        f"{recipe.model} needs about {needed / GB:.1f} GB with the smallest batch,"
        f" {free / GB:.1f} GB are free on this {kind}"
    )


def without_memory(recipe: Recipe, config=None):
    """The model with its method, on the meta device, in the dtype that its weights have. Raises
    what inject raises, and what ``found_layout`` raises."""
    config, task, method = config or load_config(recipe), task_of(recipe.task), recipe.config()
    if task.classes:
        config.num_labels = len(task.classes)
    dtype = getattr(config, "dtype", None) or torch.float32

    def made(config):
        return auto_class(task).from_config(config, dtype=dtype)

    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            model = made(config)
        layout = found_layout(model, method, made, config)
        with unsaid("self_test"):  # which cannot run on the meta device
            return pelt_fast.inject(model, method, layout=layout)


def checked_config(recipe: Recipe):
    """The config of a recipe's model. Raises what :func:`without_memory` raises; a layout that the
    weights alone can tell is left to inject."""
    config = load_config(recipe)
    with suppress(NotKnown), unsaid("lora_targets", "named_linears"):  # which will speak again
        without_memory(recipe, config)
    return config


def _candidates(recipe: Recipe, kind: str) -> Iterator[Recipe]:
    """The recipe with ever smaller needs."""
    yield from _batches(recipe)
    light = recipe.replace(gradient_checkpointing=True)
    yield from _batches(light)
    can = importlib.util.find_spec("bitsandbytes") is not None and kind == "cuda"
    if task_of(recipe.task).causal and can:
        yield from _batches(light.replace(quantize="nf4"))


def _batches(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with batches halved, as many tokens a step."""
    size, name = recipe.batch_size, "batch_size"
    least = 1
    if recipe.batch_tokens:
        size, name = recipe.batch_tokens, "batch_tokens"
        least = max(recipe.max_length, recipe.max_target)
    times = recipe.accumulation
    while size >= least:
        yield recipe.replace(**{name: size}, accumulation=times)
        if size % 2:
            return
        size, times = size // 2, times * 2
