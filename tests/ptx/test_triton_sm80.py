"""The machine's first judge: what Triton makes of well-known kernels for sm_80 is right on it.

Nothing of this project's own kernels is used here: Triton's compiler is known to be right, so what
is wrong here is the machine. Each kernel runs in three modes, whose bits are equal.
"""

import os
import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(
        "Triton compiles only where TRITON_INTERPRET is 0: TRITON_INTERPRET=0 pytest tests/ptx",
        allow_module_level=True,
    )

from .errors import BadAccess, Race
from .machine import Mode
from .matmul import matmul_kernel
from .triton_launch import on_the_machine

MODES = {"early": Mode(), "late": Mode(late=True), "shuffled": Mode(shuffled=True, seed=5)}


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    y = tl.load(y_ptr + offs, mask=offs < n, other=0.0)
    tl.store(out_ptr + offs, x + y, mask=offs < n)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + offs, mask=offs < N, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    y = e / tl.sum(e, axis=0)
    tl.store(out_ptr + row * N + offs, y.to(out_ptr.dtype.element_ty), mask=offs < N)


@triton.jit
def reduce_kernel(
    x_ptr, out_ptr, M, N, AXIS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    x = tl.load(x_ptr + offs_m[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
    found = tl.sum(x.to(tl.float32), axis=AXIS)
    if AXIS == 0:
        tl.store(out_ptr + offs_n, found, mask=offs_n < N)
    else:
        tl.store(out_ptr + offs_m, found, mask=offs_m < M)


@triton.jit
def dropout_kernel(x_ptr, out_ptr, n, p, seed, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    kept = tl.rand(seed, offs) > p
    tl.store(out_ptr + offs, tl.where(kept, x / (1 - p), 0.0), mask=offs < n)


def in_every_mode(launch, out: torch.Tensor, edit=None, modes=MODES) -> torch.Tensor:
    """What ``launch(out)`` writes, the same bits in every mode. What it leaves is NaN."""
    first = None
    for name in modes:
        found = torch.full_like(out, float("nan"))
        with on_the_machine("sm80", MODES[name], edit=edit):
            launch(found)
        assert torch.isfinite(found).all(), f"{name}: an element was not written"
        bits = found.view(torch.int16 if found.itemsize == 2 else torch.int32)
        assert first is None or torch.equal(bits, first), f"{name} differs"
        first = bits
    return found


def rounding(dtype: torch.dtype) -> float:
    """Half a unit in the last place, relative."""
    return torch.finfo(dtype).eps / 2


def random(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_vector_add(dtype):
    x, y = random(1000, dtype=dtype), random(2000, dtype=dtype)[1000:]
    found = in_every_mode(lambda out: add_kernel[(4,)](x, y, out, 1000, BLOCK=256), x)
    assert torch.equal(found, x + y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_softmax(dtype):
    x = random(5, 300, dtype=dtype)[:, 1:206]
    out = torch.empty(5, 205, dtype=dtype)
    found = in_every_mode(
        lambda out: softmax_kernel[(5,)](x, out, x.stride(0), 205, BLOCK=256), out
    )
    oracle = x.double().softmax(1)
    error = ((found.double() - oracle).abs() / oracle).max().item()
    assert error <= rounding(dtype) + 16 * rounding(torch.float32), error


def product(a, b, bias, dtype, edit=None, modes=MODES, tile=(64, 32, 32)):
    """a @ b + bias by Triton's code."""
    (M, K), N = a.shape, b.shape[1]
    block_m, block_n, block_k = tile
    grid = (triton.cdiv(M, block_m), triton.cdiv(N, block_n))

    def launch(out):
        matmul_kernel[grid](
            a, b, bias, out, M, N, K, *a.stride(), *b.stride(), HAS_BIAS=bias is not None,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=3,
        )  # fmt: skip

    return in_every_mode(launch, torch.empty(M, N, dtype=dtype), edit, modes)


def check_product(found, a, b, bias):
    """Every rounding that a @ b + bias may have: K sums in fp32, tf32 inputs, the result's."""
    a, b = a.double(), b.double()
    oracle, sizes = a @ b, a.abs() @ b.abs()
    if bias is not None:
        oracle, sizes = oracle + bias.double(), sizes + bias.double().abs()
    inputs = 2.0**-9 if found.dtype == torch.float32 else 0.0  # tf32: two of at most 2^-10
    budget = (a.shape[1] * rounding(torch.float32) + inputs) * sizes
    budget += rounding(found.dtype) * oracle.abs()
    worst = ((found.double() - oracle).abs() / budget).max().item()
    assert worst <= 1, worst


DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


@DTYPES
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_matmul(dtype, with_bias):
    a, b = random(72, 144, dtype=dtype), random(144, 48, dtype=dtype)
    bias = random(48, dtype=dtype) if with_bias else None
    check_product(product(a, b, bias, dtype), a, b, bias)


@DTYPES
@pytest.mark.parametrize("which", ["a", "b", "both"])
def test_matmul_of_transposed_operands(dtype, which):
    a = random(96, 64, dtype=dtype).T if which != "b" else random(64, 96, dtype=dtype)
    b = random(32, 96, dtype=dtype).T if which != "a" else random(96, 32, dtype=dtype)
    check_product(product(a, b, None, dtype), a, b, None)


@DTYPES
def test_matmul_of_integers_is_exact(dtype):
    """A wrong layout shows at once: all elements are small integers, all sums are exact."""
    a = torch.randint(-4, 5, (64, 96), generator=torch.Generator().manual_seed(1)).to(dtype)
    b = torch.randint(-4, 5, (96, 32), generator=torch.Generator().manual_seed(2)).to(dtype)
    found = product(a, b, None, torch.float32)
    assert torch.equal(found.double(), a.double() @ b.double())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reduction(axis, dtype):
    x = random(50, 90, dtype=dtype)
    out = torch.empty(x.shape[1 - axis])
    found = in_every_mode(
        lambda out: reduce_kernel[(1,)](x, out, 50, 90, AXIS=axis, BLOCK_M=64, BLOCK_N=128), out
    )
    budget = x.shape[axis] * rounding(torch.float32) * x.double().abs().sum(axis)
    assert ((found.double() - x.double().sum(axis)).abs() <= budget).all()


def philox(seed: int, counters: np.ndarray) -> np.ndarray:
    """The first words of Philox4x32-10 (Salmon et al., 2011), for counters below 2^32."""
    c = [counters.astype(np.uint64)] + [np.zeros(len(counters), np.uint64)] * 3
    k = [seed & 0xFFFFFFFF, seed >> 32]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        one, two = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(two >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]), two & low,
             (one >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]), one & low]  # fmt: skip
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0].astype(np.uint32)


def test_dropout_draws_philox():
    x, seed = random(1000), 0x1234_5678_9ABC
    found = in_every_mode(lambda out: dropout_kernel[(4,)](x, out, 1000, 0.3, seed, BLOCK=256), x)
    drawn = philox(seed, np.arange(1000)).view(np.int32).astype(np.int64)
    uniform = np.where(drawn < 0, -drawn - 1, drawn) * 2.0**-31
    kept = torch.from_numpy(uniform > np.float32(0.3))
    assert 600 < kept.sum() < 800
    assert torch.equal(found != 0, kept)
    oracle = torch.where(kept, x.double() / 0.7, 0.0)
    assert ((found.double() - oracle).abs() <= 2.0**-22 * oracle.abs()).all()


# ---- kernels that were broken on purpose

WAIT, BARRIER = re.compile(r"cp\.async\.wait_group\s+(\d+);"), re.compile(r"bar\.sync\s+0;")


def nth(pattern, change, number: int):
    """An edit of the ``number``-th match in a PTX text; the text has to have it."""

    def edit(text: str) -> str:
        found = list(re.finditer(pattern, text))[number]
        return text[: found.start()] + change(found) + text[found.end() :]

    return edit


def broken(edit, mode: str, dtype=torch.float16):
    a, b = random(64, 160, dtype=dtype), random(160, 32, dtype=dtype)
    check_product(product(a, b, None, dtype, edit, [mode]), a, b, None)


MODE = pytest.mark.parametrize("mode", MODES)


CAUGHT = r"cp.async of warp|nobody wrote"


def test_the_pipeline_is_what_the_edits_expect():
    """Two waits: in the loop for two groups fewer, and at its end; a barrier after each."""
    seen = []
    broken(lambda text: seen.append(text) or text, "early")
    assert [found[1] for found in WAIT.finditer(seen[0])] == ["2", "0"]
    assert len(re.findall(BARRIER, seen[0])) == 5


@MODE
@pytest.mark.parametrize("number", [0, 1])
def test_a_pipeline_without_a_wait_is_caught(number, mode):
    with pytest.raises((Race, BadAccess), match=CAUGHT):
        broken(nth(WAIT, lambda found: "", number), mode)


@MODE
def test_a_wait_for_one_group_too_few_is_caught(mode):
    with pytest.raises((Race, BadAccess), match=CAUGHT):
        broken(nth(WAIT, lambda found: "cp.async.wait_group 3;", 0), mode)


@MODE
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_pipeline_without_a_barrier_is_caught(number, mode):
    """All but the first, which is between copies to different bytes."""
    with pytest.raises(Race):
        broken(nth(BARRIER, lambda found: "", number), mode)


@MODE
@pytest.mark.parametrize("pattern, change", [
    (r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans", lambda found: found[1]),
    (r"(mma\.sync[^{]*\{[^}]*\}, \{ *)(%r\d+)(, *)(%r\d+)", lambda m: m[1] + m[4] + m[3] + m[2]),
    (r"(cp\.async\.c[ag]\.shared\.global \[ *%r\d+ \+ )0", lambda found: found[1] + "16"),
], ids=["trans", "fragment", "address"])  # fmt: skip
def test_a_wrong_fragment_or_address_is_caught(pattern, change, mode):
    with pytest.raises((AssertionError, Race, BadAccess)):
        broken(nth(pattern, change, 0), mode)
