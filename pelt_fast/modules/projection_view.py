"""A projection that shares its matrix with others, or keeps it transposed: GPT-2's Conv1D, Phi-3's
and ModernBERT's fused q, k, v and gate, up."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .hooked import brought_to, is_away

LORA = "pelt_lora"  # the child a LoRA site is registered as, on the linear it modifies
JOINED = "pelt_fused"  # the child that runs in the place of a fused projection


_FEATURES = ("in_features", "out_features")


class ProjectionView(nn.Module):
    """Rows of the weight (N, K) that ``owner``, an nn.Linear or Conv1D, holds, as a linear layer.

    ``rows`` None is all of them. It owns nothing: weight and bias look into the owner's, wherever
    they are moved.
    """

    def __init__(self, owner: nn.Module, name: str, rows: slice | None):
        super().__init__()
        self.__dict__["owner"] = owner  # hidden: the owner holds the part, not the other way round
        self.name, self.rows = name, rows

    @property
    def weight(self) -> Tensor:
        weight = self.owner.weight
        weight = weight.t() if isinstance(self.owner, Conv1D) else weight
        return weight if self.rows is None else weight[self.rows]

    @property
    def bias(self) -> Tensor | None:
        bias = self.owner.bias
        return bias if bias is None or self.rows is None else bias[self.rows]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> Tensor:
        """Copy ``value`` into the owner's weight or bias; what was there before."""
        held = getattr(self, name)
        before = held.detach().clone()
        held.data.copy_(value)
        return before


def view_of(owner: nn.Module, name: str, config) -> ProjectionView:
    """The part ``name`` of a projection: "" all of it, "q", "k" or "v" of three by the heads of
    ``config``, "i/n" the i-th of n equal ones; the one that is there already, where one is."""
    fused = owner._modules.get(JOINED)
    if fused is not None and name in fused._modules:
        return fused._modules[name]
    if isinstance(owner, nn.Linear) and not is_readable(owner):
        raise ValueError(
            f"a fused projection ({type(owner).__name__}, {shape_of(owner)}) is quantised: its rows"
            " cannot be told apart. Leave it out of the quantisation"
        )
    if name == "":
        return ProjectionView(owner, name, None)
    outputs, _ = shape_of(owner)
    if name in ("q", "k", "v"):
        queries = config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None) or queries
        heads = outputs // (queries + 2 * keys)
        starts = dict(q=0, k=queries, v=queries + keys)
        stops = dict(q=queries, k=queries + keys, v=queries + 2 * keys)
        return ProjectionView(owner, name, slice(starts[name] * heads, stops[name] * heads))
    index, count = map(int, name.split("/"))
    size = outputs // count
    return ProjectionView(owner, name, slice(index * size, (index + 1) * size))


def host_of(linear: nn.Module) -> nn.Module:
    """The module that is called, and that holds what is put on ``linear``: the owner of a whole
    part, else the layer itself."""
    return linear.owner if isinstance(linear, ProjectionView) and linear.rows is None else linear


def parameter_of(linear: nn.Module) -> nn.Parameter | None:
    """The parameter that rows of ``linear``'s weight lie in as they are; None: transposed, or not
    there (``is_linear``)."""
    if not isinstance(linear, ProjectionView):
        return getattr(linear, "weight", None)
    return None if isinstance(linear.owner, Conv1D) else linear.owner.weight


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear layer, however its weight is stored."""
    if isinstance(linear, ProjectionView):
        outputs, inputs = shape_of(linear.owner)
        rows = linear.rows
        return outputs if rows is None else rows.stop - rows.start, inputs
    if isinstance(linear, Conv1D):
        return linear.nf, linear.nx
    return linear.out_features, linear.in_features


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: torch's, a part of one, or what says its features as
    quantised layers do (GPTQ's have no weight, only packed rows)."""
    sized = (isinstance(getattr(module, name, None), int) for name in _FEATURES)
    return isinstance(module, (nn.Linear, ProjectionView)) or all(sized)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight; of a layer that has none, the first tensor of floats it holds: it tells where the
    layer is and how precise."""
    linear = linear.owner if isinstance(linear, ProjectionView) else linear
    weight = getattr(linear, "weight", None)
    if weight is not None:
        return weight
    held = (*linear.parameters(), *linear.buffers())
    return next((tensor for tensor in held if tensor.is_floating_point()), held[0])


def device_of(linear: nn.Module) -> torch.device:
    """Where a layer computes: where its weight is, or is brought to."""
    return brought_to(linear) if is_away(linear) else weight_of(linear).device


def holds_numbers(linear: nn.Module) -> bool:
    """Whether the weight is numbers an op can read: not quantised, not a subclass that is one only
    to its own library's kernels (bitsandbytes, torchao, GPTQ)."""
    weight = getattr(linear, "weight", None)
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()


def is_readable(linear: nn.Module) -> bool:
    """Whether the weight is the matrix (N, K) of numbers that the layer multiplies by."""
    return holds_numbers(linear) and tuple(linear.weight.shape) == shape_of(linear)
