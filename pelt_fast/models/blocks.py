"""Feed-forward blocks: what is refused before anything is changed, and how a site gets at one."""

from collections.abc import Iterator

from torch import nn

from pelt_fast.config import Modification
from pelt_fast.modules import FrozenFFN
from pelt_fast.modules.late import Attribute, Dropout, Taken
from pelt_fast.modules.part import host_of
from pelt_fast.modules.slot import passthrough

from .conditions import Alone, Unhooked, Unpatched
from .known import own_file, why_foreign
from .places import Place
from .slots import FFNSlot, find
from .takeover import MovedDropout, Takeover
from .unnamed import why_beside


def check_block(base: nn.Module, place: Place, slot: FFNSlot, modification: Modification) -> None:
    """ValueError where a site cannot do the work of a block rightly.

    A block that is a module of its own may be any: its own forward then runs beside the adapter.
    Where the layer spells it out the site does a part of the layer's work, which must be known.
    """
    if modification.placement in ("after_norm", "around_norm"):
        return  # the whole layer runs itself
    if slot.is_container:
        inside = modification.placement == "before_dropout" and slot.output_dropout is not None
        why = why_itself(base, place.layer, slot) if inside else None
        if why is not None:
            raise ValueError(
                f"{place.name}.{slot.entry}: {why}, so nothing can be put before its dropout: put"
                " the adapter after it (placement='after_dropout')"
            )
        return
    for path, module in _around(place.layer, slot):
        why = why_foreign(module, own_file(base))
        if why is not None:
            raise ValueError(
                f"{_joined(place.name, path)}: {why}. It spells the feed-forward block out, and a"
                " method there would do a part of its work: put one on the attention, or after the"
                " layer's norm (placement='after_norm')"
            )
    for condition in _unhooked(place, slot):
        why = condition.why_not()
        if why is not None:
            raise ValueError(f"{condition.path} {why}: remove it before inject")


def take_block(base: nn.Module, place: Place, slot: FFNSlot, takeover: Takeover) -> FrozenFFN:
    """The block of a layer, for a site that runs in its place. Where the layer spells it out, what
    the site will run is silenced, and watched."""
    layer = place.layer
    if slot.is_container:
        return describe_block(base, layer, slot)

    def take(owner: nn.Module, name: str) -> Attribute:
        taken = takeover.take(Taken(owner, name))
        conditions.taken.append(taken)
        return taken

    conditions = takeover.conditions_of(find(base, place.stack.owner))
    ffn = describe_block(base, layer, slot, take)
    conditions.conditions += [
        *(Alone(_joined(place.name, p), *_owner_and_name(layer, p))
          for p in (slot.in_proj, slot.out_proj)),
        *(Unpatched(_joined(place.name, path), module) for path, module in _around(layer, slot)),
        *_unhooked(place, slot),
    ]  # fmt: skip
    takeover.call(host_of(find(layer, slot.out_proj)), passthrough)
    for path in slot.output_dropout_also:
        hook = MovedDropout(ffn.output_dropout)
        takeover.hook(find(layer, path).register_forward_hook(hook))
    return ffn


def describe_block(base: nn.Module, layer: nn.Module, slot: FFNSlot, at=Attribute) -> FrozenFFN:
    """The block of a layer; ``at`` makes what reads an attribute when the block runs."""
    block = find(layer, slot.entry) if slot.is_container else None
    projections = filter(None, (slot.gate_proj, slot.in_proj, slot.out_proj))
    taken: dict[str, Attribute] = {}

    def reader(path: str) -> Attribute:
        return taken.setdefault(path, taken.get(path) or at(*_owner_and_name(layer, path)))

    return FrozenFFN(
        block, find(layer, slot.in_proj), find(layer, slot.out_proj),
        None if slot.gate_proj is None else find(layer, slot.gate_proj),
        reader(slot.activation),
        *(Dropout(reader(path) if path else None)
          for path in (slot.activation_dropout, slot.output_dropout)),
        [Attribute(*_owner_and_name(layer, path)) for path in projections],
        None if block is None else why_itself(base, layer, slot),
    )  # fmt: skip


def why_itself(base: nn.Module, layer: nn.Module, slot: FFNSlot) -> str | None:
    """Why a block that is a module of its own must run its own forward, or None."""
    return why_foreign(find(layer, slot.entry), own_file(base)) or why_beside(layer, slot)


def _owner_and_name(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.partition(":")[0].rpartition(".")
    return find(layer, parent), name


def _around(layer: nn.Module, slot: FFNSlot) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose forwards spell a block out: the layer, and what holds a piece of it."""
    paths = [slot.in_proj, slot.out_proj, slot.activation, slot.output_dropout]
    held = {path.rpartition(".")[0] for path in filter(None, paths)}
    return ((path, find(layer, path)) for path in sorted({"", *held}))


def _unhooked(place: Place, slot: FFNSlot) -> list[Unhooked]:
    """The pieces of a spelled-out block that a site does the work of."""
    paths = (slot.in_proj, slot.out_proj, slot.activation, slot.activation_dropout,
             slot.output_dropout)  # fmt: skip
    pieces = ((path, find(place.layer, path)) for path in filter(None, paths))
    return [
        Unhooked(_joined(place.name, path), host_of(piece), path == slot.entry)
        for path, piece in pieces if isinstance(piece, nn.Module)
    ]  # fmt: skip


def _joined(name: str, path: str) -> str:
    return f"{name}.{path}".removesuffix(".")
