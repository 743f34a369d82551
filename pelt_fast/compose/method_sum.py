"""The weighted sum of methods as one method: its config and its tensors.

Every method is a low-rank residual (docs/maths.md#i1; paper, section 3). So the sum
h + w1 Δh1 + w2 Δh2 is one method, whose rank is the sum of the ranks: the factors are concatenated,
and the weights multiply the second factors.
"""

import dataclasses

import torch
from torch import Tensor

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.layouts.names import is_method

# the axis of a tensor that is the rank; of a bottleneck for each head, (H, R, D), the second one
_RANK_AXIS = {"lora_a": 0, "lora_b": 1, "down_weight": 0, "down_bias": 0, "up_weight": 1,
              "prefix": 3, "embedding": 0}  # fmt: skip
UPDATE = ("lora_b", "up_weight", "up_bias")  # the tensors that a weight multiplies
_KEYS = ("prefix", "prompt")  # forms that add keys to an attention


@dataclasses.dataclass
class Kept:
    """A method that is not active. ``trained``: its tensors as they train. ``plain``: the same
    method with prefixes folded and its scale in the second factors."""

    config: PeltConfig
    trained: dict[str, Tensor]
    plain: dict[str, Tensor]


Chosen = dict[str, tuple[Kept, float]]  # methods and their weights, by name


def sum_config(chosen: Chosen) -> PeltConfig:
    """The config of the sum. Raises ValueError where no single method is the sum."""
    sizes: dict[Modification, int] = {}
    for name, (kept, weight) in chosen.items():
        for modification in kept.config.modifications:
            if modification.patterns:
                raise ValueError(f"{name!r} has patterns: a LoRA of several ranks is in no sum")
            _check_weight_of_keys(name, modification, weight)
            summed = _summed(modification)
            if summed in sizes:
                _check_can_be_added(modification)
            if modification.layer_norm == "out" and weight != 1:
                raise ValueError(f"{name!r} has a LayerNorm on its update: its weight must be 1")
            if modification.form not in _KEYS or weight:
                sizes[summed] = sizes.get(summed, 0) + modification.size
    configs = [kept.config for kept, _ in chosen.values()]
    return PeltConfig(
        " + ".join(f"{weight:g} {name}" for name, (_, weight) in chosen.items()),
        tuple(dataclasses.replace(summed, size=size) for summed, size in sizes.items()),
        any(config.train_head for config in configs),
        max((c.dtype for c in configs), key=lambda dtype: getattr(torch, dtype).itemsize),
    )


def _summed(modification: Modification) -> Modification:
    """A modification as it is in a sum, of size 1 (a bias: 0). Those that are equal are added."""
    composition = modification.composition if modification.form in _KEYS else "add"
    return dataclasses.replace(
        modification, composition=composition, size=min(modification.size, 1), scale=1.0,
        dropout=0.0, init="lora", reparameterization="none", mlp_dim=1,
    )  # fmt: skip


def _check_weight_of_keys(name: str, modification: Modification, weight: float) -> None:
    gated = modification.form in _KEYS and modification.composition == "gated"
    if gated and weight not in (0, 1):
        raise ValueError(
            f"{name!r} has a {modification.form}, whose keys are there or not: its weight can be 1"
            f" or 0, got {weight}"
        )


def _check_can_be_added(modification: Modification) -> None:
    ungated = (modification.form, modification.composition) == ("prefix", "add")
    if modification.layer_norm != "none" or ungated:
        what = "an ungated prefix" if ungated else "an adapter with a LayerNorm"
        raise ValueError(
            f"two methods have {what} on {modification.target}: no one of them is their sum"
        )


@torch.no_grad()
def sum_tensors(chosen: Chosen, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the sum, by name. ``base``: the model's own parameters before any method;
    those that methods train become base + Σ w (trained - base)."""
    by_name: dict[str, list[tuple[Tensor, float]]] = {}
    for kept, weight in chosen.values():
        for name, tensor in kept.plain.items():
            by_name.setdefault(name, []).append((tensor, weight))
    tensors = {}
    for name, parts in by_name.items():
        if not is_method(name):
            before = base[name]
            tensors[name] = before + sum(w * (t - before) for t, w in parts)
        else:
            tensors[name] = _concatenated(name.rpartition(".")[2], parts)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _concatenated(last: str, parts: list[tuple[Tensor, float]]) -> Tensor | None:
    """One tensor of the sum from those of its methods; ``last`` is the last step of its name."""
    if last in ("prefix", "embedding"):
        parts = [(tensor, weight) for tensor, weight in parts if weight]
        if not parts:
            return None
    tensors = [weight * t if last in UPDATE else t for t, weight in parts]
    if last == "prefix" and parts[0][1] != 1:  # an ungated one: the weight multiplies its values
        tensors = [torch.stack([tensors[0][:, 0], parts[0][1] * tensors[0][:, 1]], 1)]
    if last == "up_bias":
        return sum(tensors[1:], tensors[0])
    if last not in _RANK_AXIS:
        return tensors[0]  # a LayerNorm's: one method alone has it
    return torch.cat(tensors, 1 if tensors[0].dim() == 3 else _RANK_AXIS[last])
