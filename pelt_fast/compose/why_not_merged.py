"""Why a site cannot be folded into the base's weights."""

from torch import nn

from pelt_fast.injection.record import Site
from pelt_fast.modules import (
    LoRALinear,
    ParallelFFNAdapter,
    ResidualFFNAdapter,
    SequentialAdapter,
)
from pelt_fast.modules.frozen_module import QUANTISED
from pelt_fast.modules.hooked import is_away
from pelt_fast.modules.projection_view import ProjectionView


def why_not(site: Site, widen_ffn: bool) -> str | None:
    """The reason a site cannot be folded, or None."""
    module = site.module
    if isinstance(module, LoRALinear):
        return _why_not_written(module, "LoRA on")
    if isinstance(module, SequentialAdapter):
        return _why_not_sequential(module)
    if isinstance(module, ResidualFFNAdapter):
        return "the adapter reads the residual stream, the block its norm"
    if isinstance(module, ParallelFFNAdapter):
        return _why_not_widened(module, widen_ffn)
    return f"{site.form} on this place is not linear"


def _why_not_sequential(module: SequentialAdapter) -> str | None:
    if module.activation != "identity" or module.layer_norm != "none":
        return "an adapter with an activation or a LayerNorm is not linear"
    if isinstance(module.frozen.module, ProjectionView) and module.frozen.module.bias is None:
        return "a projection that shares its matrix has no place for a bias"
    return _why_not_written(module, "a projection with")


def _why_not_widened(module: ParallelFFNAdapter, widen_ffn: bool) -> str | None:
    ffn = module.ffn
    if not widen_ffn:
        return "a parallel FFN adapter is folded on request (widen_ffn=True)"
    if ffn.gate_proj is not None:
        return "a gated block multiplies, an adapter does not: it cannot be widened by one"
    if module.activation != ffn.activation or module.layer_norm != "none":
        return f"the block's activation is {ffn.activation}, the adapter's {module.activation}"
    if any(isinstance(projection.module, ProjectionView) for projection in ffn.projections):
        return "a block whose matrices are joined or stored transposed (Conv1D) cannot grow"
    return ffn.why_not_fused()


def _why_not_written(module: nn.Module, what: str) -> str | None:
    """Why a layer's weight cannot be overwritten, or None."""
    linear, reason = module.frozen.module, module.frozen.why_not_read()
    if reason == QUANTISED:
        return f"{what} a quantised weight"
    if is_away(linear):
        return f"{what} an offloaded weight (take accelerate's hooks off first)"
    if reason is not None:
        return f"{what} a layer that does more: {reason}"
    holder = linear.owner if isinstance(linear, ProjectionView) else linear
    return None if "weight" in holder._parameters else f"{what} a weight that is computed"
