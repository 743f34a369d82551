"""explain: what each site runs, why it is not the fused op, and what it saves and trains."""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from pelt_fast.layouts.written import DISCOVERED, written
from pelt_fast.modules import (
    MultiHeadAdapter,
    ParallelFFNAdapter,
    PrefixBank,
    Prompt,
    QueryHeads,
)
from pelt_fast.modules.decision import Decision
from pelt_fast.modules.frozen_module import QUANTISED
from pelt_fast.modules.late import in_force
from pelt_fast.modules.projection_view import device_of, shape_of, weight_of
from pelt_fast.ops.common import dispatch

from .count import ParameterCount, count_parameters
from .handles import carrier_of
from .record import Site, injection_of


@dataclass(frozen=True)
class SiteReport:
    """One site of an :class:`Explanation`.

    ``plan`` is what runs in the model's present mode. ``fell_back`` is True if this is not the
    fused op; ``reason`` says why, or is a note. ``saved_bytes`` are the bytes saved for backward,
    for each token (of a prefix: for each query).
    """

    name: str
    op: str
    plan: str
    fell_back: bool
    reason: str
    saved_bytes: int
    trainable: int


@dataclass(frozen=True)
class Explanation:
    """What was injected. ``print`` shows a table; ``as_dict`` gives plain data."""

    method: str
    model: str
    training: bool
    sites: tuple[SiteReport, ...]
    count: ParameterCount
    layout: str = ""  # of a model without a row: the layout that was discovered

    @property
    def fallbacks(self) -> list[SiteReport]:
        """The sites that do not run their fused op."""
        return [site for site in self.sites if site.fell_back]

    def as_dict(self) -> dict:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        rows = [("site", "op", "plan", "saved B/token", "trainable", "note")]
        rows += [
            (s.name, s.op, s.plan, f"{s.saved_bytes:,}", f"{s.trainable:,}", s.reason)
            for s in self.sites
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip((*row[:5], ""), [*widths, 0]))
            + row[5]
            for row in rows
        ]
        count = self.count
        head = f"{self.method} on {self.model}, {mode} mode"
        tail = (
            f"{len(self.fallbacks)} of {len(self.sites)} sites fell back."
            f" Method {count.paper:,} parameters ({count.percent:.2f} % of the base) as the paper"
            f" counts, {count.kept:,} kept, {count.trainable:,} training now"
            f" (task head {count.head:,})."
        )
        found = [f"{DISCOVERED}\n{self.layout}"] if self.layout else []
        return "\n".join([head, *(line.rstrip() for line in lines), tail, *found])


def explain(model: nn.Module) -> Explanation:
    """Say what each site of an injected model runs, and why.

    Args:
        model: a model with a method, or a wrapper of one. The answer is for its present mode
            (training or not), device and dtype.

    Returns:
        An :class:`Explanation`: ``sites``, each with its op, what runs, the reason for a fallback,
        the bytes saved for backward for each token, and the trainable parameters; ``fallbacks``;
        ``count``. It prints as a table.

    Raises:
        ValueError: nothing is injected.

    Example:
        pelt_fast.inject(model, "mam")
        print(pelt_fast.explain(model))
    """
    model = carrier_of(model)
    injection = injection_of(model)
    low, counted = _base_dtype(model), set()
    sites = []
    for site in injection.sites:
        is_new = id(site.module) not in counted  # several sites share one prefix bank
        counted.add(id(site.module))
        trainable = sum(p.numel() for p in site.module.parameters() if p.requires_grad)
        sites.append(_report(site, trainable if is_new else 0, low))
    return Explanation(
        injection.config.name, type(model).__name__, model.training, tuple(sites),
        count_parameters(model), written(injection.layout) if injection.discovered else "",
    )  # fmt: skip


def _base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of what is frozen and not quantised (embeddings, norms): of the activations."""
    frozen = (p.dtype for p in model.parameters() if not p.requires_grad)
    return next((dtype for dtype in frozen if dtype in dispatch.DTYPES), torch.float32)


def _report(site: Site, trainable: int, low: torch.dtype) -> SiteReport:
    module, device, note = site.module, _device(site.module), ""
    if getattr(module, "merged", False):
        return SiteReport(site.name, site.op, "merged", False, "", 0, trainable)
    if isinstance(module, Prompt):
        plan, saved = dispatch.Plan("concatenation"), 0
    elif isinstance(module, (PrefixBank, QueryHeads)):
        attention = site.details["attention"]
        queries = site.details["queries"]
        plan, note = _prefix_plan(module, attention, queries, device)
        saved = _prefix_bytes(module, attention, queries, low)
    elif isinstance(module, MultiHeadAdapter):
        p = in_force(module.dropout)
        plan, note = _noted(dispatch.plan("prefix", device, p, **_dtype_and_size(module, low)))
        saved = _low_rank_bytes(module, low)
    elif isinstance(module, ParallelFFNAdapter):
        decision = module.decision()
        plan, note = _plan_of(module, decision, device, low)
        if decision.runs_op and module.is_packed and plan.reason is None:
            plan = dispatch.Plan(f"packed, {plan.name}")
        is_one_op = decision.runs_op or decision.reason == QUANTISED
        saved = _ffn_bytes(module, is_one_op, low)
    else:
        plan, note = _plan_of(module, module.decision(), device, low)
        saved = _low_rank_bytes(module, low)
    return SiteReport(
        site.name, site.op, plan.name, plan.reason is not None, plan.reason or note, saved,
        trainable,
    )  # fmt: skip


def _plan_of(
    module: nn.Module, decision: Decision, device, low: torch.dtype
) -> tuple[dispatch.Plan, str]:
    """The plan, and a note on it. Beside a quantised layer's own product the op runs fused."""
    if decision.reason != QUANTISED:
        return dispatch.Plan(decision.plan, decision.reason), ""
    plan = dispatch.plan("beside", device, **_dtype_and_size(module, low))
    return plan, f"beside the layer's own product: {QUANTISED}"


def _device(module: nn.Module) -> torch.device:
    """Where a site computes."""
    holder = next(inner for inner in module.modules() if list(inner.parameters(recurse=False)))
    return device_of(holder)


def _prefix_plan(module, attention: nn.Module, queries: int, device) -> tuple[dispatch.Plan, str]:
    if attention.config._attn_implementation == "pelt_fast_eager":
        return dispatch.Plan("reference", "the model was told to use eager attention"), ""
    value = getattr(attention, "dropout", getattr(attention, "attention_dropout", 0.0))
    p = float(getattr(value, "p", value)) if attention.training else 0.0
    own = next(module.parameters())
    plan, note = _noted(dispatch.plan("prefix", device, p, **_dtype_and_size(module, own.dtype)))
    if note:
        return plan, note
    heads, _, dim = _heads_shape(module)
    grouped = heads * dim != queries
    if plan.name == "triton" and grouped:
        exact = _attention_dtype(attention, own.dtype) == torch.float32
        when = "always (fp32)" if exact else "under a mask"
        return plan, f"grouped heads: K and V are expanded {when}"
    return plan, ""


def _noted(plan: dispatch.Plan) -> tuple[dispatch.Plan, str]:
    """The plan, and a note on it."""
    blocked = "dropout: torch's CPU flash kernel has none"
    return plan, blocked if plan.name == "blocked" else ""


def _dtype_and_size(module: nn.Module, low: torch.dtype) -> dict:
    """The facts that choose the kernels: the base's dtype, and the rank or prefix length."""
    if isinstance(module, PrefixBank):
        return dict(dtype=next(module.parameters()).dtype, size=module.shape[3])
    return dict(dtype=_compute_dtype(module, low), size=_down(module).shape[-2])


def _compute_dtype(module: nn.Module, low: torch.dtype) -> torch.dtype:
    """The dtype of the activations: the frozen weight's; ``low`` if it is quantised."""
    frozen = module.ffn.out_proj if hasattr(module, "ffn") else module.frozen
    dtype = weight_of(frozen.module).dtype
    return dtype if dtype in dispatch.DTYPES else low


def _down(module: nn.Module) -> nn.Parameter:
    return module.lora_a if hasattr(module, "lora_a") else module.down_weight


def _prefix_bytes(module: nn.Module, attention: nn.Module, queries: int, low: torch.dtype) -> int:
    """q, k, v, o in the base's dtype and the fp32 lse, of one token in one attention."""
    element = _attention_dtype(attention, low).itemsize
    kv_heads, _, head_dim = _heads_shape(module)
    return (2 * queries + 2 * kv_heads * head_dim) * element + 4 * queries // head_dim


def _attention_dtype(attention: nn.Module, low: torch.dtype) -> torch.dtype:
    """The dtype of the activations in an attention; ``low`` if all its weights are quantised."""
    own = (p.dtype for name, p in attention.named_parameters() if "pelt_" not in name)
    return next((dtype for dtype in own if dtype in dispatch.DTYPES), low)


def _heads_shape(module: nn.Module) -> tuple[int, int, int]:
    """Heads, size and head dim of a prefix or of bottlenecks by head."""
    return tuple(module.shape[2:] if isinstance(module, PrefixBank) else module.down_weight.shape)


def _ffn_bytes(module: ParallelFFNAdapter, is_one_op: bool, low: torch.dtype) -> int:
    inner, inputs = shape_of(module.ffn.in_proj.module)
    widths = inner * (len(module.ffn.projections) - 1) + module.down_weight.shape[0] + inputs
    if not is_one_op:
        widths += inner + module.up_weight.shape[0]
    return widths * _compute_dtype(module, low).itemsize


def _low_rank_bytes(module: nn.Module, low: torch.dtype) -> int:
    """x and the M x R intermediate; of bottlenecks by head x, o and its lse."""
    element = _compute_dtype(module, low).itemsize
    if isinstance(module, MultiHeadAdapter):
        heads, _, dim = _heads_shape(module)
        return 3 * heads * dim * element + 4 * heads
    return sum(_down(module).shape) * element
