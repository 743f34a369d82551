"""A projection that shares its matrix with others, or stores it transposed: GPT-2's Conv1D, and the
fused q, k, v and gate, up of Phi-3 and ModernBERT."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pelt_fast.ops.common.dispatch import DTYPES

from .hooked import brought_to, is_away
from .rows import Rows, rows_named

LORA = "pelt_lora"  # the name under which a linear registers its LoRA site as a child
JOINED = "pelt_fused"  # the name of the child that runs instead of a fused projection


_FEATURES = ("in_features", "out_features")


class ProjectionView(nn.Module):
    """Some rows of the weight (N, K) of ``owner``, an nn.Linear or Conv1D, as a linear layer.

    ``rows`` is a slice, or rows that are apart; None means all rows. The view owns no tensor: its
    weight and bias are read from the owner's, also after the owner is moved.
    """

    def __init__(self, owner: nn.Module, name: str, rows: slice | Rows | None):
        super().__init__()
        self.__dict__["owner"] = owner  # hidden: the owner registers the part
        if isinstance(rows, slice):
            outputs, _ = shape_of(owner)
            rows = Rows(rows.start, rows.stop, outputs, outputs)
        self.name, self.which = name, rows

    @property
    def rows(self) -> slice | Tensor | None:
        """Its rows as an index: a slice, or the indices of rows that are apart; None means all."""
        return None if self.which is None else self.which.index

    @property
    def weight(self) -> Tensor:
        weight = self.owner.weight
        weight = weight.t() if isinstance(self.owner, Conv1D) else weight
        return weight if self.which is None else self.which.of(weight)

    @property
    def bias(self) -> Tensor | None:
        bias = self.owner.bias
        return bias if bias is None or self.which is None else self.which.of(bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> Tensor:
        """Copy ``value`` into the owner's weight or bias. Return the value before."""
        before = getattr(self, name).detach().clone()
        held = getattr(self.owner, name).data
        held = held.t() if name == "weight" and isinstance(self.owner, Conv1D) else held
        held[slice(None) if self.which is None else self.which.index] = value.to(held.dtype)
        return before


def view_of(owner: nn.Module, name: str, config) -> ProjectionView:
    """The part ``name`` of a projection: "" is all of it; "q", "k" or "v" is one of three, sized
    by the heads of ``config``, or "q=a-b" by its rows; "i/n" is the i-th of n equal parts; "a-b" is
    the rows from a to b, and "a-b%p" these rows of each p. An existing part is reused."""
    name, _, numbers = name.partition("=")
    fused = owner._modules.get(JOINED)
    if isinstance(getattr(fused, name, None), ProjectionView):
        return fused._modules[name]
    if isinstance(owner, nn.Linear) and not is_readable(owner):
        raise ValueError(
            f"a fused projection ({type(owner).__name__}, {shape_of(owner)}) is quantised: its rows"
            " cannot be told apart. Leave it out of the quantisation"
        )
    if name == "":
        return ProjectionView(owner, name, None)
    outputs, _ = shape_of(owner)
    if numbers:
        return ProjectionView(owner, name, rows_named(numbers, outputs))
    if name in ("q", "k", "v"):
        queries = config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None) or queries
        heads = outputs // (queries + 2 * keys)
        starts = dict(q=0, k=queries, v=queries + keys)
        stops = dict(q=queries, k=queries + keys, v=queries + 2 * keys)
        return ProjectionView(owner, name, slice(starts[name] * heads, stops[name] * heads))
    return ProjectionView(owner, name, rows_named(name, outputs))


def host_of(linear: nn.Module) -> nn.Module:
    """The module that the model calls, and that holds the sites on ``linear``: the owner if
    ``linear`` is all of it, else ``linear``."""
    return linear.owner if isinstance(linear, ProjectionView) and linear.which is None else linear


def parameter_of(linear: nn.Module) -> nn.Parameter | None:
    """The parameter whose rows are the weight of ``linear``. None if it is transposed, or if there
    is no weight (``is_linear``)."""
    if not isinstance(linear, ProjectionView):
        return getattr(linear, "weight", None)
    return None if isinstance(linear.owner, Conv1D) else linear.owner.weight


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear layer, however its weight is stored."""
    if isinstance(linear, ProjectionView):
        outputs, inputs = shape_of(linear.owner)
        return outputs if linear.which is None else linear.which.count, inputs
    if isinstance(linear, Conv1D):
        return linear.nf, linear.nx
    return linear.out_features, linear.in_features


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: torch's, a part of one, or a module with the attributes
    of a quantised layer, in_features and out_features (GPTQ layers have packed rows, no weight)."""
    sized = (isinstance(getattr(module, name, None), int) for name in _FEATURES)
    return isinstance(module, (nn.Linear, ProjectionView)) or all(sized)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight. If a layer has none, its first floating-point tensor: it tells the layer's device
    and dtype."""
    linear = linear.owner if isinstance(linear, ProjectionView) else linear
    weight = getattr(linear, "weight", None)
    if weight is not None:
        return weight
    held = (*linear.parameters(), *linear.buffers())
    return next((tensor for tensor in held if tensor.is_floating_point()), held[0])


def device_of(linear: nn.Module) -> torch.device:
    """The device of a layer: where its weight is, or where a hook loads it."""
    return brought_to(linear) if is_away(linear) else weight_of(linear).device


def holds_numbers(linear: nn.Module) -> bool:
    """Whether an op can read the numbers of the weight: it is not quantised (float8 is), and no
    tensor subclass that only its own library can read (bitsandbytes, torchao, GPTQ)."""
    weight = getattr(linear, "weight", None)
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in DTYPES


def is_readable(linear: nn.Module) -> bool:
    """Whether the weight is the matrix (N, K) of numbers that the layer multiplies by."""
    return holds_numbers(linear) and tuple(linear.weight.shape) == shape_of(linear)
