"""The library's context kernels, each way, against fp64: the output and log-sum-exp of the context,
and its gradients from a merged o and a joint lse, as prefix attention asks for them.

On a GPU every kernel by its name, with the dropout mask that it drew; else torch's CPU kernel.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pelt_fast.kernels import config
from pelt_fast.ops.common.heads import (
    additive_mask,
    aligned,
    context_scores,
    expand_heads,
    heads_last,
)
from pelt_fast.ops.prefix_attention.gpu import context_forward, kernel_for
from tests.flat import context_backward

from .judge import COMPILED, DEVICE, check, dense

HALF, SINGLE = (torch.float16, torch.bfloat16), (torch.float32,)
# which the 16-bit kernels are told to be; "efficient" is what fp32 leads to, or a mask without cuDNN
KERNELS = (
    {"flash": HALF, "cudnn": HALF, "efficient": HALF + SINGLE} if COMPILED else {"cpu": SINGLE}
)
KINDS = [(kernel, dtype) for kernel, dtypes in KERNELS.items() for dtype in dtypes]
PREFIX = 5


@dataclass(frozen=True)
class Problem:
    """Sizes (B, H, Hkv, T, S, D), and how the inputs lie: "heads last" is how models hold them."""

    sizes: tuple[int, int, int, int, int, int]
    causal: bool = False
    mask: str = ""  # "bool", or "added" to the scores
    layout: str = "heads last"


SQUARE = (2, 4, 4, 64, 64, 64)
PROBLEMS = {
    "square": Problem(SQUARE),
    "causal": Problem(SQUARE, causal=True),
    "odd": Problem((2, 4, 4, 37, 53, 32)),
    "odd causal": Problem((1, 2, 2, 37, 37, 32), causal=True),
    "grouped": Problem((2, 4, 2, 64, 64, 64), causal=True),
    "one query": Problem((2, 4, 2, 1, 40, 64)),
    "contiguous": Problem(SQUARE, layout="contiguous"),
    "of one projection": Problem(SQUARE, layout="of one projection"),
    "masked": Problem(SQUARE, mask="bool"),
    "mask of a layer": Problem((2, 4, 4, 48, 53, 64), mask="added"),
    "masked, odd": Problem((2, 4, 4, 37, 53, 32), mask="bool"),
    "masked, grouped": Problem((2, 4, 2, 64, 72, 64), mask="added", layout="of one projection"),
    "hidden row": Problem((3, 4, 2, 9, 13, 16), causal=True, mask="bool"),
    "causal, more keys": Problem((2, 4, 2, 24, 40, 64), causal=True),
}


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same (B, H, T, D) as a slice of a wider projection, heads last, or contiguous."""
    if layout == "contiguous":
        return t
    if layout == "heads last":
        return heads_last(t)
    wide = torch.stack([t, t, t], -2).transpose(1, 2).contiguous()  # (B, T, H, 3, D)
    return wide[..., 1, :].transpose(1, 2)


def make(problem: Problem, dtype) -> tuple[Tensor, ...]:
    """q, k, v, do, and prefix keys and values (H, P, D)."""
    batch, heads, kv_heads, queries, keys, dim = problem.sizes
    shapes = [(batch, heads, queries, dim), *[(batch, kv_heads, keys, dim)] * 2]
    q, k, v = (laid_out(dense(*shape, dtype=dtype), problem.layout) for shape in shapes)
    do = heads_last(dense(*shapes[0], dtype=dtype))
    return q, k, v, do, *(dense(heads, PREFIX, dim, dtype=dtype) for _ in range(2))


def mask_of(problem: Problem, dtype) -> Tensor | None:
    """A mask with a row that sees nothing, or None."""
    batch, _, _, queries, keys, _ = problem.sizes
    if not problem.mask:
        return None
    mask = torch.rand(batch, 1, queries, keys, device=DEVICE) > 0.3
    mask[0, :, 2] = False
    if problem.mask == "bool":
        return mask
    return aligned(additive_mask(mask, dtype))


def definition(q, k, v, pk, pv, scores, factor, kind):
    """In plain torch: o and lse of the context; o and lse of [prefix; context]; and a function of
    do that returns the context's share of dq, dk, dv."""
    q, k, v = (t.detach().to(kind).requires_grad_() for t in (q, k, v))
    wide_k, wide_v = (expand_heads(t, q.shape[1]) for t in (k, v))
    context = context_scores(q, wide_k, *scores)
    # q's share by way of the prefix is the merge kernel's
    prefix = scores[2] * q.detach() @ pk.to(kind).mT
    own, joint = (torch.logsumexp(t, -1) for t in (context, torch.cat([prefix, context], -1)))
    weights = torch.exp(context - joint.unsqueeze(-1))
    factor = factor.to(kind) if isinstance(factor, Tensor) else factor
    o = (factor * weights) @ wide_v + torch.exp(prefix - joint.unsqueeze(-1)) @ pv.to(kind)
    alone = torch.exp(context - own.unsqueeze(-1)).nan_to_num(0.0)
    return (
        ((factor * alone) @ wide_v, own, o.detach(), joint.detach()),
        lambda do: torch.autograd.grad(o, (q, k, v), do.to(kind)),
    )


def drawn_mask(problem: Problem, tensors, scores, p: float, dtype) -> Tensor | float:
    """What the kernel multiplies its weights by: values that are the identity show it."""
    if not p:
        return 1.0
    batch, _, kv_heads, _, keys, dim = problem.sizes
    assert keys <= dim
    identity = torch.eye(keys, dim, device=DEVICE, dtype=dtype).expand(batch, kv_heads, keys, dim)
    torch.manual_seed(3)
    weights, _, _ = context_forward(*tensors[:2], heads_last(identity), *scores, p)
    kept = weights[..., :keys] != 0
    wide = expand_heads(tensors[1], tensors[0].shape[1])
    seen = kept[context_scores(tensors[0], wide, *scores) > float("-inf")].double()
    assert abs(seen.mean().item() - (1 - p)) < 5 * (p * (1 - p) / seen.numel()) ** 0.5
    return kept / (1 - p)


def runs(kernel: str, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, p: float) -> None:
    """Skip where the inputs lead to another kernel."""
    found = kernel_for(q, k, mask, causal, p)
    if found != kernel:
        pytest.skip(f"{found} takes it")


def librarys_error(kernel: str, q, k, v, do, causal: bool, scale: float) -> float:
    """The largest relative error of torch's own attention by the memory-efficient kernel in fp32,
    which multiplies in three parts of fewer bits; 0 for the others, whose errors are below those of
    plain torch in their dtype."""
    if kernel != "efficient" or q.dtype != torch.float32:
        return 0.0
    found = []
    for kind in (torch.float32, torch.float64):
        leaves = [t.detach().to(kind).requires_grad_() for t in (q, k, v)]
        wide = (expand_heads(t, q.shape[1]) for t in leaves[1:])
        name = SDPBackend.EFFICIENT_ATTENTION if kind == torch.float32 else SDPBackend.MATH
        with sdpa_kernel(name):
            o = F.scaled_dot_product_attention(leaves[0], *wide, is_causal=causal, scale=scale)
        found.append((o.detach(), *torch.autograd.grad(o, leaves, do.to(kind))))
    return max(
        ((single.double() - exact).abs().max() / exact.abs().max()).item()
        for single, exact in zip(*found, strict=True)
    )


@pytest.mark.parametrize("kernel, dtype", KINDS, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1] if COMPILED else [0.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_context_matches_fp64_each_way(name, p, kernel, dtype):
    problem = PROBLEMS[name]
    *tensors, pk, pv = make(problem, dtype)
    q, k, v, do = tensors
    scores = (mask_of(problem, dtype), problem.causal, q.shape[-1] ** -0.5)
    with config.forced("context", kernel):
        runs(kernel, q, k, *scores[:2], p)
        if p and k.shape[2] > q.shape[-1]:
            pytest.skip("the mask is read with values that are the identity")
        factor = drawn_mask(problem, tensors, scores, p, dtype)
        (own_o, own, o, joint), gradients = definition(
            q, k, v, pk, pv, scores, factor, torch.float64
        )
        same, same_gradients = definition(q, k, v, pk, pv, scores, factor, dtype)
        torch.manual_seed(3)
        got_o, got_lse, rng = context_forward(q, k, v, *scores, p)
        known = librarys_error(kernel, q, k, v, do, problem.causal, scores[2])
        seen = own > float("-inf")
        assert torch.equal(seen, got_lse > float("-inf"))
        check(got_lse[seen], same[1][seen], own[seen], dtype, known)
        check(got_o[seen], same[0][seen], own_o[seen], dtype, known)
        merged = heads_last(o.to(dtype)), joint.float()
        grads = context_backward(do, q, k, v, *merged, rng, *scores, p)
    for got, rounded, want in zip(grads, same_gradients(do), gradients(do), strict=True):
        check(got, rounded, want, dtype, known)
        assert got.transpose(1, 2).is_contiguous()
