"""A recipe as a commented YAML file, for a user to change."""

import json

from .fitting import Fit
from .look import Look
from .recipe import Recipe
from .registry import task_of

COMMENTS = {
    "epochs": "how often each row is seen; or steps: N",
    "learning_rate": "AdamW's",
    "max_length": "tokens of a row; what is longer is cut, and said",
    "max_target": "tokens of a target",
    "batch_size": "rows of a batch",
    "batch_tokens": "tokens of a batch: the longest row times the rows",
    "accumulation": "batches of a step",
    "eval_batch_size": "rows of an evaluation's batch",
    "precision": "bf16, fp16 or fp32",
    "gradient_checkpointing": "true: less memory, more time",
    "quantize": "nf4 or int8: a base of 4 or 8 bits (bitsandbytes)",
    "packing": "fill each row of a batch with whole rows",
    "max_generated": "tokens of a text that an evaluation writes",
}


def text(look: Look, fit: Fit) -> str:
    """The YAML of a recipe that fits, with what was seen."""
    recipe = fit.recipe
    head = [*_seen(look, fit), f"extends: {recipe.task}", f"model: {json.dumps(recipe.model)}",
            f"data: {json.dumps(recipe.data)}", *_method(recipe)]  # fmt: skip
    names = ["epochs", "learning_rate", "max_length"]
    causal = task_of(recipe.task).causal
    names += ["max_target", "max_generated"] if task_of(recipe.task).translates else []
    names += ["batch_tokens"] if recipe.batch_tokens else ["batch_size"]
    names += ["accumulation", "eval_batch_size", "precision", "gradient_checkpointing"]
    names += ["packing", "quantize", "max_generated"] if causal else []
    lines = [f"{name}: {json.dumps(getattr(recipe, name))}" for name in names]
    return "\n".join([*head, *map(_commented, lines, names)]) + "\n"


def _commented(line: str, name: str) -> str:
    return f"{line:<30}# {COMMENTS[name]}"


def _seen(look: Look, fit: Fit) -> list[str]:
    """What was seen of rows, lengths and memory, as comments."""
    train, validation = look.rows
    lengths, recipe = look.lengths, fit.recipe
    cut = sum(length > recipe.max_length for length in lengths)
    room = "" if fit.free is None else f" of the {fit.free / 1e9:.1f} GB that are free"
    return [
        f"# Written by pelt-fast init. Rows of {look.form}: {train:,} train, {validation:,}"
        " validation.",
        f"# Tokens of a row ({len(lengths):,} counted): half have at most {look.share(0.5):,}, 95 %"
        f" {look.share(0.95):,}, the longest {lengths[-1]:,}; {cut:,} are cut.",
        f"# Memory: about {fit.needed / 1e9:.2f} GB{room} on this {fit.device}, by counting.",
    ]


def _method(recipe: Recipe) -> list[str]:
    """The method; LoRA with the words that are changed most."""
    if recipe.method != "lora":
        return [f"method: {json.dumps(recipe.method)}"]
    first = recipe.config().modifications[0]
    names = {"attention.q": "q", "attention.k": "k", "attention.v": "v", "attention.o": "o"}
    targets = [names.get(m.target, m.target) for m in recipe.config().modifications]
    words = {
        f"r: {first.size}": "the rank",
        f"alpha: {first.scale * first.size:g}": "the update is multiplied by alpha / r",
        f"targets: {','.join(targets)}": "of q, k, v, o, ffn.in, ffn.out",
        f"dropout: {first.dropout:g}": "on the input of the update",
    }
    return ["method:", "  preset: lora", *(f"  {word:<28}# {why}" for word, why in words.items())]
