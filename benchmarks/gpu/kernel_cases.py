"""Every kernel on one input: ours, the same in plain PyTorch, the bytes and flops of its file."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.kernels.adapter import adapter
from pelt_fast.kernels.ffn_act import ffn_act, ffn_act_bwd
from pelt_fast.kernels.heads import prefix_merge
from pelt_fast.kernels.heads_bwd import prefix_merge_bwd
from pelt_fast.kernels.mask import mask_bits
from pelt_fast.kernels.norm import moments, norm_bwd, norm_gradients
from pelt_fast.kernels.rank_down import rank_down, rank_down_bwd
from pelt_fast.kernels.rank_up import rank_up, rank_up_bwd
from pelt_fast.kernels.tail_gemm import tail_gemm
from pelt_fast.kernels.widened_ffn import widened_act, widened_act_bwd
from pelt_fast.ops.common.activations import activate, derivative

from .kernel_case import KernelCase, P, Sizes, drawn
from .routed_cases import routed


def cases(
    device: torch.device, sizes: Sizes, dtype=torch.bfloat16, families: Iterable[str] | None = None
) -> Iterator[KernelCase]:
    """Make one case at a time, so that its memory is free for the next: a case is used before the
    next one is made. ``families``: names of ``FAMILIES``, else all."""
    seed = torch.tensor([7, 11], dtype=torch.int64, device=device)
    for name in families or FAMILIES:
        yield from FAMILIES[name](device, sizes, dtype, seed)


def low_rank(device, sizes: Sizes, dtype, seed) -> Iterator[KernelCase]:
    """rank_down, rank_up, their backward, the mask."""
    randn, M, K = drawn(device, dtype), sizes.m, sizes.k
    x, e = randn(M, K), dtype.itemsize
    for R in sizes.ranks:
        a, b = randn(R, K, of=torch.float32) / K**0.5, randn(K, R, of=torch.float32)
        h = randn(M, R)
        al, bl = a.to(dtype), b.to(dtype)
        small = e * M * R + 4 * R * K
        for p in (0.0, P):
            row = seed if p else None
            tag = f"R={R} p={p}"
            yield KernelCase(
                "rank_down", tag, lambda: rank_down(x, a, dropout_p=p, seed=row)[:1],
                lambda drop: (drop(x, p) @ al.t(),), e * M * K + small, 2 * M * K * R,
            )  # fmt: skip
            bits = mask_bits(seed, p, M, K) if p else None
            yield KernelCase(
                "rank_down_bwd", tag,
                lambda: rank_down_bwd(h, x, torch.float32, dropout_p=p, seed=row, bits=bits)[:1],
                lambda drop: (h.float().t() @ drop(x, p).float(),),
                e * M * K + small + (M * K / 8 if p else 0), 2 * M * K * R,
            )  # fmt: skip
            base = x.clone()
            yield KernelCase(
                "rank_up", f"{tag} on base",
                lambda: (rank_up(h, b, x, out=base, base_dropout_p=p, seed=row),),
                lambda drop: (drop(x, p) + h @ bl.t(),), 2 * e * M * K + small, 2 * M * K * R,
            )  # fmt: skip
        yield KernelCase(
            "rank_up_bwd", f"R={R}", lambda: rank_up_bwd(x, h, b, need_bias=True),
            lambda drop: (x @ bl, x.float().t() @ h.float(), x.float().sum(0)),
            e * M * K + 2 * small, 4 * M * K * R,
        )  # fmt: skip
    yield KernelCase(
        "mask_bits", f"p={P}", lambda: (mask_bits(seed, P, M, K),),
        lambda drop: (_packed(drop(torch.ones_like(x), P) != 0),), M * K / 8, 0,
    )  # fmt: skip


def _packed(keep: Tensor) -> Tensor:
    weights = 1 << torch.arange(8, device=keep.device)
    return (keep.view(keep.shape[0], -1, 8) * weights).sum(-1).to(torch.uint8)


def adapters(device, sizes: Sizes, dtype, seed) -> Iterator[KernelCase]:
    """The adapter in one kernel."""
    randn, M, K, e = drawn(device, dtype), sizes.m, sizes.k, dtype.itemsize
    x, base = randn(M, K), randn(M, K)
    norm = randn(K, of=torch.float32), randn(K, of=torch.float32)
    for R in sizes.ranks:
        down, up = randn(R, K, of=torch.float32) / K**0.5, randn(K, R, of=torch.float32)
        d, u = randn(R, of=torch.float32), randn(K, of=torch.float32)
        for norm_ in (None, norm):

            def plain(drop, norm_=norm_, down=down, up=up, d=d, u=u):
                v = x if norm_ is None else F.layer_norm(x, (K,), *(n.to(dtype) for n in norm_))
                t = F.linear(v, down.to(dtype), d.to(dtype))
                return base + F.linear(F.relu(t), up.to(dtype), u.to(dtype)), t

            yield KernelCase(
                "adapter", f"R={R}{'' if norm_ is None else ' norm'}",
                lambda: adapter(x, base, down, d, up, u, norm=norm_), plain,
                3 * e * M * K + e * M * R, 4 * M * K * R,
            )  # fmt: skip


def norms(device, sizes: Sizes, dtype, seed) -> Iterator[KernelCase]:
    """A LayerNorm in front of a rank-R product: forward, dx, the small gradients."""
    randn, M, K, e = drawn(device, dtype), sizes.m, sizes.k, dtype.itemsize
    x, norm = randn(M, K) + 1, [randn(K, of=torch.float32) for _ in range(2)]
    weight, bias = norm
    for R in sizes.ranks:
        down, d = randn(R, K, of=torch.float32) / K**0.5, randn(R, of=torch.float32)
        own, dt = moments(x), randn(M, R)

        def product(x, down, d, weight, bias):
            low = x.dtype
            u = F.layer_norm(x, x.shape[-1:], weight.to(low), bias.to(low))
            return F.linear(u, down.to(low), d.to(low))

        def gradients(dt=dt, down=down, d=d, product=product):
            leaves = [t.detach().requires_grad_() for t in (x, down, d, weight, bias)]
            return torch.autograd.grad(product(*leaves), leaves, dt)

        t, small = product(x, down, d, weight, bias), e * M * R + 4 * R * K
        yield KernelCase(
            "rank_down_norm", f"R={R}", lambda: rank_down(x, down, d, norm=(own, *norm))[:1],
            lambda drop: (product(x, down, d, *norm),), e * M * K + small, 2 * M * K * R,
        )  # fmt: skip
        yield KernelCase(
            "norm", f"dx R={R}", lambda: norm_bwd(dt, t, x, down, d, *norm, None)[:1],
            lambda drop: gradients()[:1], 2 * e * M * K + 2 * small, 2 * M * K * R,
        )  # fmt: skip
        yield KernelCase(
            "rank_down_bwd_norm", f"R={R}", lambda: norm_gradients(dt, x, own, down, *norm),
            lambda drop: gradients()[1:], e * M * K + 2 * small, 2 * M * K * R,
        )  # fmt: skip


def tail(device, sizes: Sizes, dtype, seed) -> Iterator[KernelCase]:
    """The frozen GEMM with its rank tail, both variants, both directions."""
    randn, M, K, R = drawn(device, dtype), sizes.m, sizes.k, sizes.ranks[0]
    e = dtype.itemsize
    x, w, s, u = randn(M, K), randn(K, K) / K**0.5, randn(M, R), randn(R, K, of=torch.float32)
    bytes_, flops = e * (2 * M * K + K * K), 2 * M * K * (K + R)
    for descriptors in (False, True):
        kind = " descriptors" if descriptors else ""
        yield KernelCase(
            "tail_gemm", f"forward R={R}{kind}",
            lambda: (tail_gemm(x, w.t(), s, u, descriptors=descriptors),),
            lambda drop: (x @ w.t() + s @ u.to(dtype),), bytes_, flops,
        )  # fmt: skip
        bits = mask_bits(seed, P, M, K)
        mask = dict(dropout_p=P, seed=seed, bits=bits)
        yield KernelCase(
            "tail_gemm", f"dx R={R} p={P}{kind}",
            lambda: (tail_gemm(x, w, s, u, descriptors=descriptors, **mask),),
            lambda drop: (x @ w + drop(s @ u.to(dtype), P),), bytes_ + M * K / 8, flops,
        )  # fmt: skip


def widened(device, sizes: Sizes, dtype, seed) -> Iterator[KernelCase]:
    """The two-segment activation."""
    randn, M, I, R, e = drawn(device, dtype), sizes.m, sizes.inner, 512, dtype.itemsize
    for gated in (False, True):
        f = "silu" if gated else "gelu"
        first = I * (2 if gated else 1)
        pre, da = randn(M, first + R), randn(M, I)
        for p in (0.0, P):
            row = seed if p else None
            common = dict(gated=gated, ffn_activation=f, activation="relu", dropout_p=p,
                          activation_dropout_p=p, seed_h=row, seed_a=row)  # fmt: skip
            act = torch.empty(M, I + R, dtype=dtype, device=device)

            def forward(common=common, act=act, pre=pre):
                widened_act(pre, act, I, R, **common)
                return (act,)

            def plain(drop, pre=pre, p=p, gated=gated, f=f, first=first):
                a = activate(f, pre[:, :I])
                a = a * pre[:, I:first] if gated else a
                return (torch.cat([drop(a, p), drop(F.relu(pre[:, first:]), p)], 1),)

            tag = f"{'gated' if gated else 'plain'} p={p}"
            yield KernelCase(
                "widened_act", tag, forward, plain, e * M * (first + R + I + R), 0
            )  # fmt: skip
            d_pre = torch.empty_like(pre)
            place = slice(first - I, first)

            def backward(common=common, d_pre=d_pre, pre=pre, da=da, place=place, first=first):
                # not timed apart: the gradients that GEMMs write there
                d_pre[:, place], d_pre[:, first:] = da, 1.0
                widened_act_bwd(d_pre, pre, None, I, R, scale=1.0, **common)
                return (d_pre,)

            def plain_backward(drop, pre=pre, da=da, p=p, gated=gated, f=f, first=first):
                d, inner = drop(da, p), pre[:, :I]
                dt = drop(torch.ones_like(pre[:, first:]), p) * (pre[:, first:] > 0)
                slope = derivative(f, inner.float()).to(dtype)
                if not gated:
                    return (torch.cat([d * slope, dt], 1),)
                return (torch.cat([d * pre[:, I:first] * slope, d * activate(f, inner), dt], 1),)

            copied = e * M * (2 * I + R)
            yield KernelCase(
                "widened_act_bwd", f"{tag} (with a copy of dA)", backward, plain_backward,
                e * M * (2 * first + I + 3 * R) + copied, 0,
            )  # fmt: skip


def separate(device, sizes: Sizes, dtype, seed) -> Iterator[KernelCase]:
    """The activation between projections that are layers of their own."""
    randn, M, I, e = drawn(device, dtype), sizes.m, sizes.inner, dtype.itemsize
    z, da = randn(M, I), randn(M, I)
    for gate in (None, randn(M, I)):
        f, extra = ("gelu", 0) if gate is None else ("silu", 1)
        for p in (0.0, P):
            drop = dict(dropout_p=p, seed=seed if p else None)

            def plain(drop, gate=gate, f=f, p=p):
                a = activate(f, z) if gate is None else activate(f, gate) * z
                return (drop(a, p),)

            def plain_backward(drop, gate=gate, f=f, p=p):
                d = drop(da, p)
                if gate is None:
                    return (d * derivative(f, z.float()).to(dtype),)
                slope = derivative(f, gate.float()).to(dtype)
                return (d * activate(f, gate), d * z * slope)

            tag = f"{'plain' if gate is None else 'gated'} p={p}"
            yield KernelCase(
                "ffn_act", tag, lambda gate=gate, f=f, drop=drop: (ffn_act(z, gate, f, **drop),),
                plain, e * M * I * (2 + extra), 0,
            )  # fmt: skip

            def backward(gate=gate, f=f, drop=drop):
                return tuple(d for d in ffn_act_bwd(da, z, gate, f, **drop) if d is not None)

            yield KernelCase(
                "ffn_act_bwd", tag, backward, plain_backward, e * M * I * (3 + 2 * extra), 0
            )


def heads(device, sizes: Sizes, dtype, seed) -> Iterator[KernelCase]:
    """The merge of a prefix and its backward, on a context of random numbers."""
    randn, e = drawn(device, dtype), dtype.itemsize
    B, H, T, D = sizes.batch, sizes.heads, sizes.queries, sizes.dim
    q, do, context = (randn(B, T, H, D).transpose(1, 2) for _ in range(3))
    own, scale = randn(B, H, T, of=torch.float32), D**-0.5
    for length in sizes.prefixes:
        pk, pv = (randn(H, length, D, of=torch.float32) for _ in range(2))
        settings = dict(scale=scale, form="softmax", composition="gated")
        o = torch.empty(B, T, H, D, dtype=dtype, device=device).transpose(1, 2)

        def plain(drop, pk=pk, pv=pv):
            z = (scale * q @ pk.to(dtype).transpose(-1, -2)).float()
            joint = torch.logaddexp(own, torch.logsumexp(z, -1)).unsqueeze(-1)
            share = torch.exp(own.unsqueeze(-1) - joint).to(dtype)
            return (share * context + torch.exp(z - joint).to(dtype) @ pv.to(dtype), joint[..., 0])

        def forward(pk=pk, pv=pv, o=o):
            lse = prefix_merge(q, pk, pv, context, own, o, **settings)
            return o, lse

        passes, flops = e * B * H * T * D, 2 * B * H * T * D * length
        yield KernelCase("prefix", f"P={length}", forward, plain, 3 * passes, 2 * flops)
        lse = forward()[1]
        dq = torch.zeros_like(q)

        for p in (0.0, P):
            given = settings if p == 0 else dict(settings, dropout_p=p, seed=seed)

            def backward(pk=pk, pv=pv, o=o, lse=lse, dq=dq, given=given):
                dq.zero_()
                dpk, dpv = prefix_merge_bwd(do, q, pk, pv, o, lse, dq, **given)
                return dq, dpk, dpv

            def plain_backward(drop, pk=pk, pv=pv, o=o, lse=lse, p=p):
                scores = scale * q.float() @ pk.transpose(-1, -2)
                w = torch.exp(scores - lse.unsqueeze(-1)).to(dtype)
                delta = (do.float() * o.float()).sum(-1, keepdim=True)
                dw, kept = do @ pv.to(dtype).transpose(-1, -2), w
                if p:
                    dw, kept = drop(dw, p), drop(w, p)
                dz = (w * (dw - delta)).to(dtype)
                dpk = scale * (dz.transpose(-1, -2) @ q).float().sum(0)
                dpv = (kept.transpose(-1, -2) @ do).float().sum(0)
                return scale * dz @ pk.to(dtype), dpk, dpv

            tag = f"P={length}{f' p={p}' if p else ''} (with zeroing dq)"
            yield KernelCase("prefix_bwd", tag, backward, plain_backward, 6 * passes, 5 * flops)


FAMILIES = {
    family.__name__: family
    for family in (low_rank, routed, adapters, norms, tail, widened, separate, heads)
}
