"""Every launch the codegen suite compiles: each kernel, each row of its table, each variant."""

from collections.abc import Iterator

import torch

from pelt_fast.kernels.adapter import adapter
from pelt_fast.kernels.config import FUSED_RANK
from pelt_fast.kernels.ffn_act import ffn_act, ffn_act_bwd
from pelt_fast.kernels.heads import prefix_merge
from pelt_fast.kernels.heads_bwd import prefix_merge_bwd
from pelt_fast.kernels.mask import dropout, mask_bits
from pelt_fast.kernels.norm import moments, norm_bwd, norm_gradients
from pelt_fast.kernels.rank_down import rank_down, rank_down_bwd
from pelt_fast.kernels.rank_up import rank_up, rank_up_bwd
from pelt_fast.kernels.tail_gemm import tail_gemm
from pelt_fast.kernels.tile import HALF
from pelt_fast.kernels.widened_ffn import widened_act, widened_act_bwd

from .edge_launches import huge, ugly
from .launch import RANKS, SEED, F, K, Launch, M, N, P, empty, reachable
from .routed_launches import routed, routed_heads


def _ranks(kernel: str, target: str, bits: int, dropped: bool) -> list[int]:
    """The ranks of the rows, and without dropout the small ones the compiler pads."""
    rows = {min(limit, 512) for limit in reachable(kernel, target, bits)}
    few = (16,) if dropped or bits != HALF else RANKS
    limit = FUSED_RANK.get(kernel, 512) if kernel == "rank_up_bwd" else 512
    return sorted(r for r in rows | set(few) if r <= limit)


def low_rank(target: str, dtype: torch.dtype) -> Iterator[Launch]:
    bits, name = torch.finfo(dtype).bits, str(dtype).removeprefix("torch.")
    x, dy = empty(M, K, dtype=dtype), empty(M, N, dtype=dtype)
    for seed in (None, SEED):
        p = 0.0 if seed is None else P
        drop = dict(dropout_p=p, seed=seed)
        tag = f"{name} p={p}"
        for r in _ranks("rank_down", target, bits, seed is not None):
            a, d = empty(r, K, dtype=torch.float32), empty(r, dtype=torch.float32)
            yield Launch(
                f"rank_down R={r} {tag}", lambda a=a, drop=drop: rank_down(x, a, **drop), True
            )
            if r == 16:
                few = empty(64 * 1024, K, dtype=dtype)  # enough rows: not split, epilogue in place
                hidden = dict(activation="gelu", h_dropout_p=p, h_seed=seed)
                yield Launch(
                    f"rank_down R={r} gelu {tag}",
                    lambda few=few, a=a, d=d, hidden=hidden: rank_down(few, a, d, **hidden), True,
                )  # fmt: skip
        for r in _ranks("rank_down_bwd", target, bits, seed is not None):
            ds = empty(M, r, dtype=dtype)
            bits_ = empty(M, K // 8, dtype=torch.uint8) if seed is not None else None
            yield Launch(
                f"rank_down_bwd R={r} {tag}",
                lambda ds=ds, drop=drop, b=bits_: rank_down_bwd(ds, x, torch.float32, bits=b, **drop),
                True,
            )  # fmt: skip
            if r == 16 and bits == HALF:
                yield Launch(
                    f"rank_down_bwd R={r} bias, own draws {tag}",
                    lambda ds=ds, drop=drop: rank_down_bwd(ds, x, torch.float32, with_bias=True, **drop),
                    True,
                )  # fmt: skip
        for r in _ranks("rank_up", target, bits, seed is not None):
            h, b = empty(M, r, dtype=dtype), empty(N, r, dtype=torch.float32)
            a, u = empty(r, K, dtype=torch.float32), empty(N, dtype=torch.float32)
            bits_ = empty(M, K // 8, dtype=torch.uint8) if seed is not None else None
            yield Launch(
                f"rank_up R={r} base {tag}",
                lambda h=h, b=b, u=u, p=p, s=seed: rank_up(h, b, dy, bias=u, out=dy, base_dropout_p=p, seed=s),
                True,
            )  # fmt: skip
            yield Launch(
                f"rank_up R={r} update {tag}",
                lambda h=h, a=a, p=p, s=seed, b=bits_: rank_up(
                    h, a.t(), x, out=x, update_dropout_p=p, seed=s, bits=b), True,
            )  # fmt: skip
        for r in _ranks("rank_up_bwd", target, bits, seed is not None):
            t, b = empty(M, r, dtype=dtype), empty(N, r, dtype=torch.float32)
            for f in ("identity", "gelu"):
                yield Launch(
                    f"rank_up_bwd R={r} {f} {tag}",
                    lambda t=t, b=b, f=f, drop=drop: rank_up_bwd(dy, t, b, activation=f, need_bias=True, **drop),
                    True,
                )  # fmt: skip
            yield Launch(
                f"rank_up_bwd R={r} into columns {tag}",
                lambda r=r, t=t, b=b, drop=drop: rank_up_bwd(
                    dy, t, b, need_bias=True, dt=t.new_empty(M, F + r)[:, F:], **drop), True,
            )  # fmt: skip
            # what stays in flight beside what else is asked for: of wgmma's races
            wgmma = target == "sm90" and bits == HALF
            for parts in ("dt", "db", "dt db", "db bias") if wgmma else ():
                needs = {f"need_{part}": part in parts.split() for part in ("dt", "db", "bias")}
                yield Launch(
                    f"rank_up_bwd R={r} {parts} alone {tag}",
                    lambda t=t, b=b, n=needs, drop=drop: rank_up_bwd(dy, t, b, **n, **drop), True,
                )  # fmt: skip
    yield Launch(f"mask {name}", lambda: mask_bits(SEED, P, M, K))
    yield Launch(f"dropout {name}", lambda: dropout(x, P, SEED), True)
    for wide in (torch.float32, dtype):
        u = empty(K, dtype=wide)
        yield Launch(
            f"dropout bias {wide} {name}",
            lambda u=u: dropout(x, P, SEED, bias=u, scale=2.0, out=x), True,
        )  # fmt: skip


def widened_ffn(target: str, dtype: torch.dtype) -> Iterator[Launch]:
    r, name = 512, str(dtype).removeprefix("torch.")
    for gated in (False, True):
        width = (2 if gated else 1) * F + r + 16
        pre, act, h = (
            empty(M, width, dtype=dtype),
            empty(M, F + r, dtype=dtype),
            empty(M, r, dtype=dtype),
        )
        for seed in (None, SEED):
            p = 0.0 if seed is None else P
            settings = dict(
                gated=gated, ffn_activation="silu" if gated else "gelu", activation="relu",
                dropout_p=p, activation_dropout_p=p, seed_h=seed, seed_a=seed,
            )  # fmt: skip
            tag = f"{'gated' if gated else 'plain'} {name} p={p}"
            yield from ffn_activation(gated, dtype, tag, dropout_p=p, seed=seed)
            yield Launch(
                f"widened_act {tag}",
                lambda pre=pre, act=act, s=settings: widened_act(pre, act, F, r, **s), True,
            )  # fmt: skip
            yield Launch(
                f"widened_act_bwd {tag}",
                lambda pre=pre, h=h, s=settings: widened_act_bwd(pre, pre, h, F, r, scale=2.0, **s), True,
            )  # fmt: skip


def ffn_activation(gated: bool, dtype: torch.dtype, tag: str, **drop) -> Iterator[Launch]:
    z, gate = empty(M, F, dtype=dtype), empty(M, F, dtype=dtype) if gated else None
    name = "silu" if gated else "gelu"
    yield Launch(f"ffn_act {tag}", lambda: ffn_act(z, gate, name, **drop), True)
    yield Launch(f"ffn_act_bwd {tag}", lambda: ffn_act_bwd(z, z, gate, name, **drop), True)


def heads(target: str, dtype: torch.dtype) -> Iterator[Launch]:
    bits, name = torch.finfo(dtype).bits, str(dtype).removeprefix("torch.")
    B, H, T = 16, 16, 1024
    for dim in (64, 128, 256) if bits == HALF else (64,):
        q = empty(B, T, H, dim, dtype=dtype).transpose(1, 2)
        lse = empty(B, H, T, dtype=torch.float32)
        for length in (30, 200):
            prefix = [empty(H, length, dim, dtype=torch.float32) for _ in range(2)]
            for form, composition in (("softmax", "gated"), ("softmax", "add"), ("relu", "add")):
                if composition == "add" and (dim, length) != (64, 30):
                    continue
                for seed in (None, SEED):
                    p = 0.0 if seed is None else P
                    settings = dict(
                        scale=0.1, form=form, composition=composition, dropout_p=p, seed=seed
                    )
                    tag = f"D={dim} P={length} {form} {composition} {name} p={p}"
                    yield Launch(
                        f"prefix {tag}",
                        lambda q=q, prefix=prefix, lse=lse, s=settings: prefix_merge(q, *prefix, q, lse, q, **s),
                        True,
                    )  # fmt: skip
                    yield Launch(
                        f"prefix_bwd {tag}",
                        lambda q=q, prefix=prefix, lse=lse, s=settings: prefix_merge_bwd(q, q, *prefix, q, lse, q, **s),
                        True,
                    )  # fmt: skip


def tail(target: str, dtype: torch.dtype) -> Iterator[Launch]:
    name = str(dtype).removeprefix("torch.")
    x, weight = empty(M, K, dtype=dtype), empty(N, K, dtype=dtype)
    bits_ = empty(M, K // 8, dtype=torch.uint8)
    for r in (16, 64):
        s, a, b = (
            empty(M, r, dtype=dtype),
            empty(r, K, dtype=torch.float32),
            empty(N, r, dtype=torch.float32),
        )
        for descriptors in (False, True):
            if descriptors and target in ("sm80", "gfx942"):
                continue  # no bulk tensor copies there
            tag = f"R={r} {'descriptors ' if descriptors else ''}{name}"
            yield Launch(
                f"tail_gemm forward {tag}",
                lambda s=s, b=b, d=descriptors: tail_gemm(x, weight.t(), s, b.t(), bias=weight[:, 0], descriptors=d),
            )  # fmt: skip
            for seed, mask in ((None, None), (SEED, bits_)):
                yield Launch(
                    f"tail_gemm dx {tag} p={0.0 if seed is None else P}",
                    lambda s=s, a=a, d=descriptors, seed=seed, mask=mask: tail_gemm(
                        x, weight, s, a, dropout_p=P, seed=seed, bits=mask, descriptors=d),
                )  # fmt: skip


def adapters(target: str, dtype: torch.dtype) -> Iterator[Launch]:
    bits, name = torch.finfo(dtype).bits, str(dtype).removeprefix("torch.")
    x, base = empty(M, K, dtype=dtype), empty(M, N, dtype=dtype)
    norm = empty(K, dtype=torch.float32), empty(K, dtype=torch.float32)
    for r in sorted({16, *reachable("adapter", target, bits)}):
        down, up = empty(r, K, dtype=torch.float32), empty(N, r, dtype=torch.float32)
        biases = empty(r, dtype=torch.float32), empty(N, dtype=torch.float32)
        for seed in (None, SEED):
            for norm_ in (None, norm):
                p = 0.0 if seed is None else P
                yield Launch(
                    f"adapter R={r}{'' if norm_ is None else ' norm'} {name} p={p}",
                    lambda d=down, u=up, b=biases, n=norm_, p=p, s=seed: adapter(
                        x, base, d, b[0], u, b[1], norm=n, dropout_p=p, seed=s), True,
                )  # fmt: skip


def norms(target: str, dtype: torch.dtype) -> Iterator[Launch]:
    name = str(dtype).removeprefix("torch.")
    x, dy, few = (
        empty(M, K, dtype=dtype),
        empty(M, K, dtype=dtype),
        empty(2, M, dtype=torch.float32),
    )
    weight, bias = empty(K, dtype=torch.float32), empty(K, dtype=torch.float32)
    yield Launch(f"moments {name}", lambda: moments(x), True)
    for r in (16, 64, 200):
        t, down, d = empty(M, r, dtype=dtype), empty(r, K, dtype=torch.float32), empty(r)
        settings = dict(activation="relu", norm=(few, weight, bias))
        yield Launch(
            f"rank_down R={r} norm {name}",
            lambda down=down, d=d, s=settings: rank_down(x, down, d, **s), True,
        )  # fmt: skip
        for residual in (None, dy):
            yield Launch(
                f"norm_bwd R={r}{'' if residual is None else ' sequential'} {name}",
                lambda t=t, down=down, d=d, dy=residual: norm_bwd(t, t, x, down, d, weight, bias, dy),
                True,
            )  # fmt: skip
        yield Launch(
            f"norm_gradients R={r} {name}",
            lambda t=t, down=down: norm_gradients(t, x, few, down, weight, bias), True,
        )  # fmt: skip


def launches(target: str) -> Iterator[Launch]:
    """All of them, for one target."""
    for dtype in (torch.bfloat16, torch.float32):
        for family in (low_rank, routed, adapters, norms, tail, widened_ffn, heads, routed_heads):
            yield from family(target, dtype)
        if target == "sm90" and dtype == torch.bfloat16:
            yield from ugly(target, dtype)
            yield from huge(target, dtype)
