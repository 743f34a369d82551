"""Keys of a study's runs: two runs with the same key are the same run."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

from pelt_fast.config import PeltConfig

from .recipe import Recipe

# fields that came after the first results, and that no study sets
LATER = ("quantize", "packing", "gradient_checkpointing")


def digest(told) -> str:
    """16 hex digits that name a value. JSON must be able to hold it."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def setting(recipe: Recipe, data: dict | None = None) -> str:
    """The key of what all runs of a task share: the model's weights, the data's files and counts,
    and the recipe without its name, method, sizes, rate and seed."""
    told = {**dataclasses.asdict(recipe), "data": data}
    for name in ("name", "method", "sizes", "learning_rate", "seed", *LATER):
        del told[name]
    weights = Path(recipe.model) / "model.safetensors"
    if weights.is_file():
        told["model"] = _hashed(weights, weights.stat().st_mtime_ns)
    return digest(told)


@functools.cache
def _hashed(path: Path, changed: int) -> str:
    """The SHA-256 of a file, computed again when the file has changed."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def told_apart(setting: str, config: PeltConfig, rate: float, seed: int, phase: str) -> dict:
    """The entries of a row of results that tell one run from every other; "key" is of all."""
    method = config.as_dict()
    return {"setting": setting, "phase": phase, "config_key": digest(method),
            "key": digest([setting, method, rate, seed, phase])}  # fmt: skip
