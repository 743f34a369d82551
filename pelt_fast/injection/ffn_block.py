"""Feed-forward blocks: the checks before anything is changed, and how a site runs a block.

A block is either a module of its own, or *spelled out*: the layer's forward calls its projections,
activation and dropouts itself. In a spelled-out block a site does a part of the layer's work.
"""

from collections.abc import Iterator

from torch import nn

from pelt_fast.config import Modification
from pelt_fast.layouts.known_forwards import own_file, why_foreign
from pelt_fast.layouts.layout import FFNLayout
from pelt_fast.layouts.lookup import find
from pelt_fast.layouts.unnamed import why_beside
from pelt_fast.modules import FFNBlock
from pelt_fast.modules.frozen_module import passthrough
from pelt_fast.modules.late import Attribute, Dropout, Taken
from pelt_fast.modules.projection_view import host_of

from .conditions import Alone, Unhooked, Unpatched
from .record import Injection
from .targets import TargetLayer


class MovedDropout:
    """Forward hook of an attention: applies the output dropout that it shares with the block.

    The site reads that dropout from the layer, which then drops nothing itself.
    """

    def __init__(self, dropout: Dropout):
        self.dropout = dropout

    def __call__(self, module: nn.Module, args, output):
        first, *rest = output
        return self.dropout(first), *rest


def check_block(
    base: nn.Module, target: TargetLayer, layout: FFNLayout, modification: Modification
) -> None:
    """ValueError where a site cannot do the work of a block correctly.

    A block that is a module of its own may be anything: its own forward then runs, with the adapter
    beside it. Where the layer spells the block out, the layer's forward must be known.
    """
    if modification.placement in ("after_norm", "around_norm"):
        return  # the whole layer runs its own forward
    if layout.is_container:
        _check_container(base, target, layout, modification)
        return
    for path, module in _around(target.layer, layout):
        why = why_foreign(module, own_file(base))
        if why is not None:
            raise ValueError(
                f"{_joined(target.name, path)}: {why}. It spells the feed-forward block out, and a"
                " method there would do a part of its work: put one on the attention, or after the"
                " layer's norm (placement='after_norm')"
            )
    for condition in _unhooked(target, layout):
        why = condition.why_not()
        if why is not None:
            raise ValueError(f"{condition.path} {why}: remove it before inject")


def _check_container(
    base: nn.Module, target: TargetLayer, layout: FFNLayout, modification: Modification
) -> None:
    if modification.placement != "before_dropout" or layout.output_dropout is None:
        return
    why = why_own_forward(base, target.layer, layout)
    if why is not None:
        raise ValueError(
            f"{target.name}.{layout.entry}: {why}, so nothing can be put before its dropout: put"
            " the adapter after it (placement='after_dropout')"
        )


def take_block(
    base: nn.Module, target: TargetLayer, layout: FFNLayout, injection: Injection
) -> FFNBlock:
    """The block of a layer, for a site that runs instead of it. If the layer spells it out, the
    layer's own projections and dropouts are made to do nothing, and are watched."""
    known = injection.blocks.get((target.layer, layout.entry))
    if known is None:
        known = injection.blocks[target.layer, layout.entry] = _block(
            base, target, layout, injection
        )
    return known


def _block(
    base: nn.Module, target: TargetLayer, layout: FFNLayout, injection: Injection
) -> FFNBlock:
    layer = target.layer
    if layout.is_container:
        return describe_block(base, layer, layout)
    conditions = injection.conditions_of(find(base, target.stack.owner))

    def take(owner: nn.Module, name: str) -> Attribute:
        taken = injection.changes.take(Taken(owner, name))
        conditions.taken.append(taken)
        return taken

    ffn = describe_block(base, layer, layout, take)
    conditions.conditions += [
        *(Alone(_joined(target.name, p), *_owner_and_name(layer, p))
          for p in (layout.in_proj, layout.out_proj)),
        *(Unpatched(_joined(target.name, p), module) for p, module in _around(layer, layout)),
        *_unhooked(target, layout),
    ]  # fmt: skip
    injection.changes.call(host_of(find(layer, layout.out_proj)), passthrough)
    for path in layout.output_dropout_also:
        hook = MovedDropout(ffn.output_dropout)
        injection.changes.hook(find(layer, path).register_forward_hook(hook))
    return ffn


def describe_block(
    base: nn.Module, layer: nn.Module, layout: FFNLayout, attribute=Attribute
) -> FFNBlock:
    """The block of a layer. ``attribute`` makes the object that reads a value from the layer when
    the block runs: an :class:`Attribute` or a :class:`Taken`."""
    block = find(layer, layout.entry) if layout.is_container else None
    projections = filter(None, (layout.gate_proj, layout.in_proj, layout.out_proj))
    made: dict[str, Attribute] = {}

    def reader(path: str) -> Attribute:
        return made.setdefault(path, made.get(path) or attribute(*_owner_and_name(layer, path)))

    dropouts = [
        Dropout(reader(path) if path else None)
        for path in (layout.activation_dropout, layout.output_dropout)
    ]
    return FFNBlock(
        block=block, in_proj=find(layer, layout.in_proj), out_proj=find(layer, layout.out_proj),
        gate_proj=None if layout.gate_proj is None else find(layer, layout.gate_proj),
        activation=reader(layout.activation or layout.in_proj), activation_dropout=dropouts[0],
        output_dropout=dropouts[1],
        projections_at=[Attribute(*_owner_and_name(layer, path)) for path in projections],
        why_itself=None if block is None else why_own_forward(base, layer, layout),
    )  # fmt: skip


def why_own_forward(base: nn.Module, layer: nn.Module, layout: FFNLayout) -> str | None:
    """Why a block that is a module of its own must run its own forward, or None."""
    if layout.activation is None:
        return "its activation is a function in its code"
    return why_foreign(find(layer, layout.entry), own_file(base)) or why_beside(layer, layout)


def _owner_and_name(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.partition(":")[0].rpartition(".")
    return find(layer, parent), name


def _around(layer: nn.Module, layout: FFNLayout) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose forwards spell a block out: the layer, and the owners of its pieces."""
    paths = [layout.in_proj, layout.out_proj, layout.activation, layout.output_dropout]
    owners = {path.rpartition(".")[0] for path in filter(None, paths)}
    return ((path, find(layer, path)) for path in sorted({"", *owners}))


def _unhooked(target: TargetLayer, layout: FFNLayout) -> list[Unhooked]:
    """The pieces of a spelled-out block whose work a site does."""
    paths = (layout.in_proj, layout.out_proj, layout.activation, layout.activation_dropout,
             layout.output_dropout)  # fmt: skip
    pieces = ((path, find(target.layer, path)) for path in filter(None, paths))
    return [
        Unhooked(_joined(target.name, path), host_of(piece), path == layout.entry)
        for path, piece in pieces if isinstance(piece, nn.Module)
    ]  # fmt: skip


def _joined(name: str, path: str) -> str:
    return f"{name}.{path}".removesuffix(".")
