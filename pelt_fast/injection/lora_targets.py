"""The linear layers of a LoRA, each with its rank and scale, and what inject refuses of them."""

import logging
import re
from dataclasses import dataclass

from torch import nn

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.config.named_modules import MODULES
from pelt_fast.layouts.layout import StackLayout
from pelt_fast.layouts.lookup import base_of
from pelt_fast.modules.projection_view import ProjectionView, is_linear, shape_of

from .named_linears import heads_of, named_linears, near
from .targets import identity, linears

logger = logging.getLogger("pelt_fast")


@dataclass(frozen=True)
class LoRATarget:
    """One linear layer of a LoRA."""

    name: str
    linear: nn.Module
    size: int
    scale: float
    pattern: str | None = None  # the pattern that says its size and scale


def lora_targets(
    model: nn.Module, modification: Modification, stacks: list[StackLayout]
) -> list[LoRATarget]:
    """The linear layers of a modification. Raises ValueError where a name or pattern is wrong."""
    if modification.target == MODULES:
        found = named_linears(model, modification)
    else:
        found = dict(linears(base_of(model), modification, stacks))
    return [_target(name, linear, modification) for name, linear in found.items()]


def _target(name: str, linear: nn.Module, modification: Modification) -> LoRATarget:
    path = name.partition(":")[0]  # of a part of a matrix, the matrix
    fits = [p for p in modification.patterns if re.match(rf"(.*\.)?({p[0]})$", path)]
    if len(fits) > 1:
        both = " and ".join(repr(pattern) for pattern, *_ in fits[:2])
        raise ValueError(f"patterns {both} are both on {name}")
    pattern, size, scale = fits[0] if fits else (None, modification.size, modification.scale)
    return LoRATarget(name, linear, size, scale, pattern)


def check_loras(model: nn.Module, config: PeltConfig, stacks: list[StackLayout]) -> None:
    """ValueError where a LoRA of ``config`` cannot be put into the model."""
    by_modification = [
        (m, lora_targets(model, m, stacks)) for m in config.modifications if m.form == "low_rank"
    ]
    for modification, targets in by_modification:
        _check_linears(targets, modification)
        if config.train_head and modification.target == MODULES:
            _check_not_in_head(model, targets)
    _check_patterns(by_modification)
    _check_one_dropout_a_matrix(by_modification)
    _check_one_each(by_modification)


ByModification = list[tuple[Modification, list[LoRATarget]]]


def _check_linears(targets: list[LoRATarget], modification: Modification) -> None:
    for target in targets:
        if not is_linear(target.linear):
            kind = type(target.linear).__name__
            raise ValueError(f"{target.name} is a {kind}: LoRA needs a linear layer")
    wide = [t for t in targets if t.size > min(shape_of(t.linear))]
    if wide:
        logger.warning(
            "LoRA of rank %d on %s is wider than a matrix it is on (%d): beyond full rank there is"
            " nothing to gain", wide[0].size, modification.target, min(shape_of(wide[0].linear)),
        )  # fmt: skip


def _check_not_in_head(model: nn.Module, targets: list[LoRATarget]) -> None:
    inside = {part for child in heads_of(model).values() for part in child.modules()}
    for target in targets:
        if target.linear in inside:
            raise ValueError(
                f"{target.name} is in the task head, which trains whole: leave it out, or give a"
                " config with train_head=False"
            )


def _check_patterns(by_modification: ByModification) -> None:
    """Each pattern must say the size of a layer."""
    all_targets = [target for _, targets in by_modification for target in targets]
    used = {target.pattern for target in all_targets}
    for modification, _ in by_modification:
        for pattern, *_ in modification.patterns:
            if pattern not in used:
                last = pattern.split(".")[-1]
                hint = near(last, {target.name: target.linear for target in all_targets})
                raise ValueError(f"pattern {pattern!r} is on no target of this LoRA{hint}")


def _check_one_dropout_a_matrix(by_modification: ByModification) -> None:
    """LoRA on two projections of one matrix reads one dropped input."""
    probabilities: dict[nn.Module, float] = {}
    for modification, targets in by_modification:
        for target in targets:
            if not isinstance(target.linear, ProjectionView):
                continue
            p = probabilities.setdefault(target.linear.owner, modification.dropout)
            if p != modification.dropout:
                raise ValueError(
                    f"{target.name} shares its matrix with another projection that has LoRA: their"
                    f" dropouts must be the same, got {p} and {modification.dropout}"
                )


def _check_one_each(by_modification: ByModification) -> None:
    """A layer can carry one LoRA: of a matrix, either the whole or its parts."""
    loras: dict[tuple, tuple[str, tuple, Modification]] = {}
    for modification, targets in by_modification:
        for target in targets:
            key = identity(target.linear)
            wanted = (target.size, target.scale, modification.dropout, modification.init)
            first, present, other = loras.setdefault(key, (target.name, wanted, modification))
            if present != wanted:
                raise ValueError(
                    f"{first} and {target.name} are one layer: two LoRA of other size, scale,"
                    " dropout or init cannot both be on it"
                )
            if other is not modification and MODULES in (other.target, modification.target):
                raise ValueError(f"{target.name} is a target twice: by two names of this method")
    _check_whole_or_parts(loras)


def _check_whole_or_parts(loras: dict[tuple, tuple]) -> None:
    whole = {owner for owner, part in loras if not part}
    for (owner, part), (name, *_) in loras.items():
        if part and owner in whole:
            raise ValueError(f"{name} is a part of a layer that has a LoRA as a whole")
