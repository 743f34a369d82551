"""What inject refuses. Every check is made before anything in the model is changed."""

from torch import nn

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.config.named_modules import MODULES
from pelt_fast.layouts.layout import StackLayout
from pelt_fast.layouts.lookup import base_of, find, task_head
from pelt_fast.modules.projection_view import shape_of

from . import attention_interface as attention
from .dimensions import head_dim_of, reads_residual
from .ffn_block import check_block
from .lora_targets import check_loras
from .targets import attention_layouts, everything_asked, ffn_layouts
from .trained_names import bias_names


def check(model: nn.Module, config: PeltConfig, stacks: list[StackLayout]) -> None:
    """ValueError when the method cannot be put into the model."""
    check_not_sharded(model)
    if not config.modifications and not (config.train_head and task_head(model)):
        raise ValueError(
            f"{config.name!r} trains the task head alone, and {type(model).__name__} has none"
        )
    for modification in config.modifications:
        if modification.form != "full" and modification.target != MODULES:
            _check_something_asked(model, modification, stacks)
            _check_modification(model, modification, stacks)
        if (modification.form, modification.target) == ("bottleneck", "ffn"):
            _check_shared_blocks(base_of(model), modification, stacks)
    check_loras(model, config, stacks)


def check_not_sharded(model: nn.Module) -> None:
    """With sharded weights a site would take one rank's part for the whole."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):  # a DTensor
            placements = ", ".join(map(str, parameter.placements))
            raise ValueError(
                f"{name} is sharded already ({placements}): inject first, then fully_shard. A"
                " tensor-parallel plan is not supported: its collectives are inside the"
                " projections that a method's sites replace"
            )


def _check_something_asked(
    model: nn.Module, modification: Modification, stacks: list[StackLayout]
) -> None:
    """A modification must change something."""
    if modification.form == "bias":
        asked = bias_names(model, modification, stacks)
    else:
        asked = list(everything_asked(base_of(model), modification, stacks))
    if asked:
        return
    first = {stack.kind for stack in stacks[:1]}
    if modification.form == "prompt" and first & set(modification.where):
        why = f": {stacks[0].no_prompt}" if stacks[0].no_prompt else ""
        raise ValueError(f"{type(model).__name__} has no prompt in its layout{why}")
    what = "biases" if modification.form == "bias" else modification.target
    where = ", ".join(modification.where)
    raise ValueError(f"{type(model).__name__} has no {what} in {where} to modify")


def _check_modification(
    model: nn.Module, modification: Modification, stacks: list[StackLayout]
) -> None:
    """What one modification needs of the modules it is on."""
    base = base_of(model)
    if modification.form == "prefix" or modification.reads == "query":
        for target, layout in attention_layouts(base, modification, stacks):
            attention.check(find(target.layer, layout.module))
            head_dim_of(target.layer, layout)
    if modification.placement == "around_norm":
        _check_norms(base, modification, stacks)
    if modification.form == "bottleneck" and modification.target == "heads":
        _check_heads(base, modification, stacks)
    if modification.form == "bottleneck" and modification.target == "ffn":
        for target, layout in ffn_layouts(base, modification, stacks):
            check_block(base, target, layout, modification)


def _check_norms(base: nn.Module, modification: Modification, stacks: list[StackLayout]) -> None:
    """The layout must say which norm a block has, before it or after it."""
    for target, layout in ffn_layouts(base, modification, stacks):
        if layout.norm is None and layout.norm_after is None:
            raise ValueError(
                f"{target.name}: an adapter around the norm of a block needs its FFNLayout to name"
                " norm (in front of a pre-norm block) or norm_after (behind a post-norm one);"
                " placement='after_norm' puts it on the layer's output, whichever it is"
            )


def _check_heads(base: nn.Module, modification: Modification, stacks: list[StackLayout]) -> None:
    """A bottleneck for each head splits the attention's input by head."""
    if modification.reads == "query":
        return
    for target, layout in attention_layouts(base, modification, stacks):
        inputs, out = (shape_of(find(target.layer, path))[1] for path in (layout.q, layout.out))
        dim = head_dim_of(target.layer, layout)
        if inputs != out:
            raise ValueError(
                f"{target.name}.{layout.module}: a bottleneck for each head reads a slice of the"
                f" input, which is {inputs} wide; {out // dim} heads of {dim} make {out}."
                " reads='query' has no such need"
            )


def _check_shared_blocks(
    base: nn.Module, modification: Modification, stacks: list[StackLayout]
) -> None:
    if modification.placement in ("after_norm", "around_norm"):
        return
    blocks: dict[nn.Module, str] = {}
    for target, layout in ffn_layouts(base, modification, stacks):
        name = f"{target.name}.{layout.entry}"
        first = blocks.setdefault(find(target.layer, layout.entry), name)
        if first != name and (not layout.is_container or reads_residual(modification, layout)):
            raise ValueError(
                f"{first} and {name} are one block, which two layers run each in its own way: an"
                " adapter on it cannot be in both. Give each layer its own, or leave the FFN out"
            )
