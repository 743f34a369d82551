"""How the sites of each form are made, registered and called: LoRA, prefix, bottleneck, prompt.

A builder takes the model, one modification, the model's stacks, and the record of the injection.
"""

from collections.abc import Callable

from torch import nn

from pelt_fast.config import Modification
from pelt_fast.config.named_modules import MODULES
from pelt_fast.layouts.layout import StackLayout
from pelt_fast.layouts.lookup import base_of, find
from pelt_fast.modules import LoRALinear, Prompt
from pelt_fast.modules.joined_projection import JoinedProjection
from pelt_fast.modules.projection_view import (
    JOINED,
    LORA,
    ProjectionView,
    device_of,
    host_of,
    shape_of,
    weight_of,
)

from .build_attention import build_attention_adapters, build_prefix, build_query_heads
from .build_ffn import build_ffn_adapters
from .dimensions import trained_dtype
from .lora_targets import lora_targets
from .never_ran import warn_of_what_never_runs
from .prompt import attach_prompt
from .record import Injection, Site
from .targets import prompt_stacks

Builder = Callable[[nn.Module, Modification, list[StackLayout], Injection], None]


def _build_lora(model, modification, stacks, injection) -> None:
    """LoRA on linear layers (paper, section 2.2 and equation 6)."""
    made: dict[nn.Module, str] = {}
    for target in lora_targets(model, modification, stacks):
        linear = target.linear
        if injection.changes.child(host_of(linear), LORA) is not None:
            continue  # tied q and k: another modification put one on this layer
        shares_matrix = isinstance(linear, ProjectionView) and linear.which is not None
        linear = _joined_view(linear, injection) if shares_matrix else linear
        dtype = trained_dtype(injection.config, weight_of(linear))
        site = LoRALinear(linear, target.size, target.scale, modification.dropout,
                          modification.init, dtype)  # fmt: skip
        injection.changes.add(host_of(linear), LORA, site)
        if not shares_matrix:  # else the joined projection calls it
            injection.changes.call(host_of(linear), site.__call__)
        injection.sites.append(Site(target.name, "lora", "low_rank", site))
        made[site] = target.name
    if modification.target == MODULES:
        warn_of_what_never_runs(model, made, injection)


def _joined_view(view: ProjectionView, injection: Injection) -> ProjectionView:
    """The view, registered with the joined projection that runs instead of its owner."""
    joined = injection.changes.child(view.owner, JOINED)
    if joined is None:
        joined = JoinedProjection(view.owner)
        injection.changes.add(view.owner, JOINED, joined)
        injection.changes.call(view.owner, joined.__call__)
    return joined._modules.get(view.name) or joined.part(view)


def _build_bottleneck(model, modification, stacks, injection) -> None:
    """Adapters (paper, section 2.2 and Table 1): on the FFN, the attention, or its heads."""
    if modification.target == "ffn":
        build_ffn_adapters(model, modification, stacks, injection)
    elif modification.reads == "query":
        build_query_heads(model, modification, stacks, injection)
    else:
        build_attention_adapters(model, modification, stacks, injection)


def _build_prompt(model, modification, stacks, injection) -> None:
    """Virtual tokens in front of the first stack's input."""
    base = base_of(model)
    for stack in prompt_stacks(modification, stacks):
        if stack.prompt.layer is None:
            embedded = base.get_input_embeddings()
            weight, width = embedded.weight, embedded.weight.shape[1]
        else:
            embedded = find(find(base, stack.prompt.layer), stack.attentions[0].q)
            weight, width = weight_of(embedded), shape_of(embedded)[1]
        dtype = trained_dtype(injection.config, weight)
        prompt = Prompt(modification, width, device_of(embedded), dtype)
        in_front = injection.changes.put_in_front(find(base, stack.owner), prompt)
        if in_front is not None:  # else another method's prompt is there, and shares its hooks
            with injection.changes.for_all():
                attach_prompt(base, stack, in_front, injection)
        name = f"{stack.owner}.embeddings".removeprefix(".")
        injection.sites.append(Site(name, "prompt", "prompt", prompt))


# in this order: an adapter is put around a projection together with its LoRA
BUILDERS: dict[str, Builder] = {
    "low_rank": _build_lora,
    "prefix": build_prefix,
    "bottleneck": _build_bottleneck,
    "prompt": _build_prompt,
}
