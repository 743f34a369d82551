"""The layers that are measured: for each the tensors, the frozen floor and the definition.

Weights are scaled so that every activation is near 1. All tensors are drawn on the CPU from one
seed: a problem with dropout has the numbers of its twin without.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.ops.common.activations import activate

from .problems import Problem
from .shapes import Shape


@dataclass(frozen=True)
class Setting:
    """How a subject is measured: tokens = rows x length, dtypes, where."""

    rows: int = 4
    length: int = 256
    dtype: torch.dtype = torch.float32
    trained: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    @property
    def tokens(self) -> int:
        """M."""
        return self.rows * self.length


class Draw:
    """Random tensors of a setting; on the meta device nothing is drawn."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.generator = torch.Generator().manual_seed(setting.seed)

    def _normal(self, shape, dtype) -> Tensor:
        if self.setting.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randn(shape, generator=self.generator).to(self.setting.device, dtype)

    def activation(self, *shape: int) -> Tensor:
        """Of size 1."""
        return self._normal(shape, self.setting.dtype)

    def weight(self, *shape: int) -> Tensor:
        """(N, K), of size K ** -0.5; a bias (N) of size 1."""
        return self._normal(shape, self.setting.dtype) / (shape[-1] ** 0.5 if shape[1:] else 1.0)

    def trained(self, *shape: int) -> torch.nn.Parameter:
        """As a weight, in the trained dtype."""
        made = self._normal(shape, self.setting.trained)
        return torch.nn.Parameter(made / (shape[-1] ** 0.5 if shape[1:] else 1.0))


def _linear(draw: Draw, shape: Shape, name: str, outputs: int, inputs: int) -> dict[str, Tensor]:
    found = {f"{name}weight": draw.weight(outputs, inputs)}
    if shape.bias:
        found[f"{name}bias"] = draw.weight(outputs)
    return found


def _applied(x: Tensor, frozen: dict, name: str = "") -> Tensor:
    return F.linear(x, frozen[f"{name}weight"], frozen.get(f"{name}bias"))


def _lora_update(drop, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return scale * F.linear(F.linear(drop(x, 0), a.to(x.dtype)), b.to(x.dtype))


def lora(shape: Shape, size: int, p: float, setting: Setting) -> Problem:
    """LoRA on the FFN's first projection."""
    draw, scale = Draw(setting), 2.0
    x = draw.activation(setting.tokens, shape.width)
    frozen = _linear(draw, shape, "", shape.inner, shape.width)
    trained = {"lora_a": draw.trained(size, shape.width), "lora_b": draw.trained(shape.inner, size)}

    def expression(masks, inputs, frozen, trained):
        (x,) = inputs
        return _applied(x, frozen) + _lora_update(masks(1), x, *trained.values(), scale)

    return Problem(
        "LoRA linear", shape, f"{shape.width} to {shape.inner}", size, p, (x,), frozen, trained,
        lambda inputs, frozen: _applied(inputs[0], frozen), expression, dict(scale=scale),
    )  # fmt: skip


def qkv(shape: Shape, size: int, p: float, setting: Setting) -> Problem:
    """LoRA on q, k and v, which read one x, each under a mask of its own."""
    draw, scale, names = Draw(setting), 2.0, ("q_", "k_", "v_")
    x = draw.activation(setting.tokens, shape.width)
    frozen, trained = {}, {}
    for name, heads in zip(names, (shape.heads, shape.groups, shape.groups)):
        outputs = heads * shape.head_dim
        frozen |= _linear(draw, shape, name, outputs, shape.width)
        trained[f"{name}lora_a"] = draw.trained(size, shape.width)
        trained[f"{name}lora_b"] = draw.trained(outputs, size)

    def floor(inputs, frozen):
        return tuple(_applied(inputs[0], frozen, name) for name in names)

    def expression(masks, inputs, frozen, trained):
        (x,) = inputs
        pairs = [(trained[f"{name}lora_a"], trained[f"{name}lora_b"]) for name in names]
        return tuple(
            _applied(x, frozen, name) + _lora_update(masks(1), x, *pair, scale)
            for name, pair in zip(names, pairs)
        )

    return Problem(
        "LoRA q, k, v", shape, f"{shape.width}", size, p, (x,), frozen, trained, floor, expression,
        dict(scale=scale, names=names),
    )  # fmt: skip


def _bottleneck(draw: Draw, width: int, size: int) -> dict[str, torch.nn.Parameter]:
    return {
        "down_weight": draw.trained(size, width), "down_bias": draw.trained(size),
        "up_weight": draw.trained(width, size), "up_bias": draw.trained(width),
    }  # fmt: skip


def _update(drop, x: Tensor, trained: dict, scale: float) -> Tensor:
    small = {name: tensor.to(x.dtype) for name, tensor in trained.items()}
    h = drop(F.relu(F.linear(x, small["down_weight"], small["down_bias"])), 0)
    return scale * F.linear(h, small["up_weight"], small["up_bias"])


def _adapter(name: str, sequential: bool, scale: float) -> Callable[..., Problem]:
    def subject(shape: Shape, size: int, p: float, setting: Setting) -> Problem:
        draw = Draw(setting)
        x = draw.activation(setting.tokens, shape.width)
        frozen = _linear(draw, shape, "", shape.width, shape.width)
        trained = _bottleneck(draw, shape.width, size)

        def expression(masks, inputs, frozen, trained):
            (x,) = inputs
            y = _applied(x, frozen)
            return y + _update(masks(1), y if sequential else x, trained, scale)

        return Problem(
            name, shape, f"{shape.width}", size, p, (x,), frozen, trained,
            lambda inputs, frozen: _applied(inputs[0], frozen), expression,
            dict(scale=scale, sequential=sequential),
        )  # fmt: skip

    subject.__doc__ = f"A projection and its {name}."
    return subject


def ffn(shape: Shape, size: int, p: float, setting: Setting) -> Problem:
    """The whole FFN with a scaled parallel adapter; p is also the block's output dropout."""
    draw, scale = Draw(setting), 4.0
    x = draw.activation(setting.tokens, shape.width)
    frozen = _linear(draw, shape, "in_", shape.inner, shape.width)
    if shape.gated:
        frozen |= _linear(draw, shape, "gate_", shape.inner, shape.width)
    frozen |= _linear(draw, shape, "out_", shape.width, shape.inner)
    trained = _bottleneck(draw, shape.width, size)

    def block(x, frozen):
        inner = _applied(x, frozen, "in_")
        if not shape.gated:
            return _applied(activate(shape.activation, inner), frozen, "out_")
        gate = activate(shape.activation, _applied(x, frozen, "gate_"))
        return _applied(gate * inner, frozen, "out_")

    def expression(masks, inputs, frozen, trained):
        (x,), drop = inputs, masks(3)
        return drop(block(x, frozen), 2) + _update(drop, x, trained, scale)

    kind = "gated FFN" if shape.gated else "FFN"
    return Problem(
        f"{kind} + parallel adapter", shape, f"{shape.width}/{shape.inner}", size, p, (x,), frozen,
        trained, lambda inputs, frozen: F.dropout(block(inputs[0], frozen), p), expression,
        dict(scale=scale),
    )  # fmt: skip


def _prefix(kind: str) -> Callable[..., Problem]:
    def subject(shape: Shape, size: int, p: float, setting: Setting) -> Problem:
        if p:
            raise ValueError("prefix attention is measured without attention dropout")
        draw, rows, dim = Draw(setting), setting.rows, shape.head_dim
        queries, keys = setting.length, setting.length
        if kind == "cross":
            queries = max(1, queries // 4)
        q = draw.activation(rows, queries, shape.heads, dim).transpose(1, 2)
        k, v = (draw.activation(rows, keys, shape.groups, dim).transpose(1, 2) for _ in range(2))
        trained = {
            name: torch.nn.Parameter(draw.trained(shape.groups, size, dim).detach() * dim**0.5)
            for name in ("prefix_k", "prefix_v")
        }
        frozen, causal = {}, kind == "causal"
        if kind == "padded":  # rows of the whole length down to half of it
            lengths = torch.linspace(keys, keys / 2, rows).long().to(q.device)
            visible = torch.arange(keys, device=q.device) < lengths[:, None]
            frozen["mask"] = visible.view(rows, 1, 1, keys)

        def attend(q, k, v, mask=None, is_causal=causal):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
            )

        def expression(masks, inputs, frozen, trained):
            return concatenated(*inputs, *trained.values(), prefix_mask(problem, frozen))

        problem = Problem(
            f"prefix attention, {kind}", shape,
            f"B{rows} H{shape.heads}/{shape.groups} T{queries} S{keys} D{dim}", size, 0.0,
            (q, k, v), frozen, trained,
            lambda inputs, frozen: attend(*inputs, frozen.get("mask")), expression,
            dict(causal=causal, attend=attend),
        )  # fmt: skip
        return problem

    subject.__doc__ = f"Attention ({kind}) with a prefix; heads grouped where the shape's are."
    return subject


def prefix_mask(problem: Problem, frozen: dict[str, Tensor]) -> Tensor | None:
    """The mask over [prefix; context]: every query sees the prefix."""
    mask, device = frozen.get("mask"), problem.device
    if problem.options["causal"]:
        length = problem.inputs[0].shape[2]
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return None if mask is None else F.pad(mask, (problem.size, 0), value=True)


def concatenated(q, k, v, prefix_k, prefix_v, mask: Tensor | None) -> Tensor:
    """Attention over [prefix; context], written out: the heads of k and v repeated as
    transformers' own wrapper does where there is a mask."""
    both = [
        torch.cat([p.to(q.dtype).expand(q.shape[0], -1, -1, -1), t], 2)
        for p, t in ((prefix_k, k), (prefix_v, v))
    ]
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        both = [t.repeat_interleave(repeats, 1) for t in both]
    return F.scaled_dot_product_attention(q, *both, attn_mask=mask)


SUBJECTS: dict[str, Callable[[Shape, int, float, Setting], Problem]] = {
    "lora": lora,
    "qkv": qkv,
    "sequential": _adapter("sequential adapter", True, 1.0),
    "parallel": _adapter("parallel adapter", False, 1.0),
    "scaled": _adapter("scaled parallel adapter", False, 4.0),
    "ffn": ffn,
    "prefix": _prefix("self"),
    "prefix-causal": _prefix("causal"),
    "prefix-padded": _prefix("padded"),
    "prefix-cross": _prefix("cross"),
}


def subject(name: str) -> Callable[[Shape, int, float, Setting], Problem]:
    """The subject called ``name``; ValueError lists those there are."""
    if name not in SUBJECTS:
        raise ValueError(f"unknown method {name!r} of a layer: choose {', '.join(SUBJECTS)}")
    return SUBJECTS[name]


def is_prefix(name: str) -> bool:
    """Whether its size is P, a length."""
    return name.startswith("prefix")
