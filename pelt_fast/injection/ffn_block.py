"""Feed-forward blocks: what is refused before anything is changed, and how a site gets at one."""

from collections.abc import Iterator

from torch import nn

from pelt_fast.config import Modification
from pelt_fast.layouts.known_forwards import own_file, why_foreign
from pelt_fast.layouts.layout import FFNLayout
from pelt_fast.layouts.lookup import find
from pelt_fast.layouts.unnamed import why_beside
from pelt_fast.modules import FrozenFFN
from pelt_fast.modules.frozen_module import passthrough
from pelt_fast.modules.late import Attribute, Dropout, Taken
from pelt_fast.modules.projection_view import host_of

from .conditions import Alone, Unhooked, Unpatched
from .record import Injection
from .targets import Place


class MovedDropout:
    """Forward hook of an attention: applies the output dropout that it shares with the block.

    The shared attribute is set to zero, so that the layer itself drops nothing.
    """

    def __init__(self, dropout: Dropout):
        self.dropout = dropout

    def __call__(self, module: nn.Module, args, output):
        first, *rest = output
        return self.dropout(first), *rest


def check_block(
    base: nn.Module, place: Place, layout: FFNLayout, modification: Modification
) -> None:
    """ValueError where a site cannot do the work of a block rightly.

    A block that is a module of its own may be any: its own forward then runs beside the adapter.
    Where the layer spells it out the site does a part of the layer's work, which must be known.
    """
    if modification.placement in ("after_norm", "around_norm"):
        return  # the whole layer runs itself
    if layout.is_container:
        inside = modification.placement == "before_dropout" and layout.output_dropout is not None
        why = why_itself(base, place.layer, layout) if inside else None
        if why is not None:
            raise ValueError(
                f"{place.name}.{layout.entry}: {why}, so nothing can be put before its dropout: put"
                " the adapter after it (placement='after_dropout')"
            )
        return
    for path, module in _around(place.layer, layout):
        why = why_foreign(module, own_file(base))
        if why is not None:
            raise ValueError(
                f"{_joined(place.name, path)}: {why}. It spells the feed-forward block out, and a"
                " method there would do a part of its work: put one on the attention, or after the"
                " layer's norm (placement='after_norm')"
            )
    for condition in _unhooked(place, layout):
        why = condition.why_not()
        if why is not None:
            raise ValueError(f"{condition.path} {why}: remove it before inject")


def take_block(base: nn.Module, place: Place, layout: FFNLayout, injection: Injection) -> FrozenFFN:
    """The block of a layer, for a site that runs in its place. Where the layer spells it out, what
    the site will run is silenced, and watched."""
    layer = place.layer
    if layout.is_container:
        return describe_block(base, layer, layout)

    def take(owner: nn.Module, name: str) -> Attribute:
        taken = injection.changes.take(Taken(owner, name))
        conditions.taken.append(taken)
        return taken

    conditions = injection.conditions_of(find(base, place.stack.owner))
    ffn = describe_block(base, layer, layout, take)
    conditions.conditions += [
        *(Alone(_joined(place.name, p), *_owner_and_name(layer, p))
          for p in (layout.in_proj, layout.out_proj)),
        *(Unpatched(_joined(place.name, path), module) for path, module in _around(layer, layout)),
        *_unhooked(place, layout),
    ]  # fmt: skip
    injection.changes.call(host_of(find(layer, layout.out_proj)), passthrough)
    for path in layout.output_dropout_also:
        hook = MovedDropout(ffn.output_dropout)
        injection.changes.hook(find(layer, path).register_forward_hook(hook))
    return ffn


def describe_block(base: nn.Module, layer: nn.Module, layout: FFNLayout, at=Attribute) -> FrozenFFN:
    """The block of a layer; ``at`` makes what reads an attribute when the block runs."""
    block = find(layer, layout.entry) if layout.is_container else None
    projections = filter(None, (layout.gate_proj, layout.in_proj, layout.out_proj))
    taken: dict[str, Attribute] = {}

    def reader(path: str) -> Attribute:
        return taken.setdefault(path, taken.get(path) or at(*_owner_and_name(layer, path)))

    return FrozenFFN(
        block, find(layer, layout.in_proj), find(layer, layout.out_proj),
        None if layout.gate_proj is None else find(layer, layout.gate_proj),
        reader(layout.activation),
        *(Dropout(reader(path) if path else None)
          for path in (layout.activation_dropout, layout.output_dropout)),
        [Attribute(*_owner_and_name(layer, path)) for path in projections],
        None if block is None else why_itself(base, layer, layout),
    )  # fmt: skip


def why_itself(base: nn.Module, layer: nn.Module, layout: FFNLayout) -> str | None:
    """Why a block that is a module of its own must run its own forward, or None."""
    return why_foreign(find(layer, layout.entry), own_file(base)) or why_beside(layer, layout)


def _owner_and_name(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.partition(":")[0].rpartition(".")
    return find(layer, parent), name


def _around(layer: nn.Module, layout: FFNLayout) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose forwards spell a block out: the layer, and what holds a piece of it."""
    paths = [layout.in_proj, layout.out_proj, layout.activation, layout.output_dropout]
    held = {path.rpartition(".")[0] for path in filter(None, paths)}
    return ((path, find(layer, path)) for path in sorted({"", *held}))


def _unhooked(place: Place, layout: FFNLayout) -> list[Unhooked]:
    """The pieces of a spelled-out block that a site does the work of."""
    paths = (layout.in_proj, layout.out_proj, layout.activation, layout.activation_dropout,
             layout.output_dropout)  # fmt: skip
    pieces = ((path, find(place.layer, path)) for path in filter(None, paths))
    return [
        Unhooked(_joined(place.name, path), host_of(piece), path == layout.entry)
        for path, piece in pieces if isinstance(piece, nn.Module)
    ]  # fmt: skip


def _joined(name: str, path: str) -> str:
    return f"{name}.{path}".removesuffix(".")
