"""Triton's own products for sm_90 are right on the machine: wgmma, mbarriers, tensor descriptors.

Triton's compiler is known to be right, so what is wrong here is the machine. Each kernel runs in
three modes, whose bits are equal: nothing of it is read or overwritten before it is waited for.
"""

import os
import re

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

MODES = {"early": Mode(), "late": Mode(late=True), "shuffled": Mode(True, True, 5)}
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
UNIT = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-10}  # of a product's error


@triton.jit
def descriptor_kernel(
    a_ptr, b_ptr, bias_ptr, c_ptr, M, N, K, TRANSPOSED: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Each program owns every PROGRAMS-th tile; loads and stores go by tensor descriptors."""
    a_desc = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    if TRANSPOSED:
        b_desc = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    else:
        b_desc = tl.make_tensor_descriptor(b_ptr, [K, N], [N, 1], [BLOCK_K, BLOCK_N])
    c_desc = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    across = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * across
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        at_m, at_n = tile // across * BLOCK_M, tile % across * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            a = a_desc.load([at_m, k * BLOCK_K])
            if TRANSPOSED:
                acc = tl.dot(a, b_desc.load([at_n, k * BLOCK_K]).T, acc)
            else:
                acc = tl.dot(a, b_desc.load([k * BLOCK_K, at_n]), acc)
        offs_n = at_n + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        c_desc.store([at_m, at_n], tl.maximum(acc, 0.0).to(c_ptr.dtype.element_ty))


@triton.jit
def twice_kernel(a_ptr, b_ptr, c_ptr, out_ptr, N, BLOCK: tl.constexpr, R: tl.constexpr):
    """(A B) C: the second product has its A in registers, from the first."""
    offs, offs_r = tl.arange(0, BLOCK), tl.arange(0, R)
    a = tl.load(a_ptr + offs[:, None] * N + offs[None, :])
    b = tl.load(b_ptr + offs[:, None] * R + offs_r[None, :])
    c = tl.load(c_ptr + offs_r[:, None] * N + offs[None, :])
    s = tl.dot(a, b).to(a.dtype)
    tl.store(out_ptr + offs[:, None] * N + offs[None, :], tl.dot(s, c))


def operands(m: int, n: int, k: int, dtype, transposed: bool = False):
    a, b = (torch.randn(shape, dtype=dtype) for shape in ((m, k), (n, k) if transposed else (k, n)))
    return a, b.T if transposed else b


def close(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within a unit of the products that each element is a sum of; fp32 is read as tf32."""
    size = a.double().abs() @ b.double().abs() + 1
    share = UNIT[torch.float32] if a.dtype == torch.float32 else 2**-20
    bound = share * size + UNIT[found.dtype] * wanted.abs()
    assert ((found.double() - wanted).abs() <= bound).all()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def in_all_modes(launch, out: torch.Tensor, words: tuple[str, ...] = ("wgmma",), edit=None):
    """The result of ``launch(out)`` in each mode; its PTX must have ``words`` in it."""
    found = {}

    def edited(text: str) -> str:
        if not all(
            word in text for word in words
        ):  # no AssertionError: a broken kernel may have one
            raise ValueError(f"the PTX has not all of {words}")
        return text if edit is None else edit(text)

    for name, mode in MODES.items():
        found[name] = torch.full_like(out, float("nan"))
        with on_the_machine("sm90", mode, edit=edited):
            launch(found[name])
        assert torch.equal(bits(found["early"]), bits(found[name])), f"{name} differs"
    return found["early"]


def matmul(dtype, transposed=False, warps=4, sizes=(100, 72, 112), edit=None, **words):
    m, n, k = sizes
    a, b = operands(m, n, k, dtype, transposed)
    blocks = (64 * warps // 4, max(64, triton.next_power_of_2(n)) if m == 64 else 64, 32)

    def launch(c):
        grid = (triton.cdiv(m, blocks[0]), triton.cdiv(n, blocks[1]))
        strides = (*a.stride(), *b.stride())
        matmul_kernel[grid](
            a, b, None, c, m, n, k, *strides, False, *blocks, num_warps=warps, num_stages=3
        )

    c = in_all_modes(launch, torch.empty(m, n, dtype=dtype), edit=edit, **words)
    close(c, a, b, a.double() @ b.double())


@DTYPES
@pytest.mark.parametrize("transposed, warps", [(False, 4), (True, 8)])
def test_matmul(dtype, transposed, warps):
    matmul(dtype, transposed, warps)


@pytest.mark.parametrize("columns", [120, 250])
def test_matmul_of_a_wide_tile(columns):
    width = triton.next_power_of_2(columns)
    matmul(torch.bfloat16, sizes=(64, columns, 64), words=(f"m64n{width}k16",))


def twice(dtype, edit=None):
    a, b, c = (torch.randn(shape, dtype=dtype) for shape in ((64, 64), (64, 32), (32, 64)))
    out = in_all_modes(
        lambda out: twice_kernel[1,](a, b, c, out, 64, 64, 32, num_warps=4),
        torch.empty(64, 64), ("}, {%r",), edit,
    )  # fmt: skip
    s = (a.double() @ b.double()).to(dtype).double()
    error = (out.double() - s @ c.double()).abs()
    assert (error <= UNIT[dtype] * (s.abs() @ c.abs().double())).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_product_of_a_product(dtype):
    twice(dtype)


def persistent(dtype, transposed: bool, warps: int, flatten: bool, edit=None):
    m, n, k = 150, 72, 120
    a, b = operands(m, n, k, dtype, transposed)
    bias, held = torch.randn(n, dtype=dtype), b.T if transposed else b

    def launch(c):
        descriptor_kernel[2,](
            a, held, bias, c, m, n, k, transposed, 2, 64 * warps // 4, 64, 32, flatten,
            num_warps=warps, num_stages=3,
        )  # fmt: skip

    words = ("wgmma", "mbarrier.try_wait", "cp.async.bulk.tensor.2d.shared")
    c = in_all_modes(launch, torch.empty(m, n, dtype=dtype), words, edit)
    close(c, a, b, (a.double() @ b.double() + bias.double()).clamp(min=0))


@DTYPES
@pytest.mark.parametrize("transposed, warps, flatten", [(False, 4, True), (True, 8, False)])
def test_persistent_matmul_of_tensor_descriptors(dtype, transposed, warps, flatten):
    persistent(dtype, transposed, warps, flatten)


# ---- kernels that were broken on purpose


def nth(pattern: str, change: str, number: int = 0):
    """An edit of the ``number``-th match in a PTX text; the text has to have it."""

    def edit(text: str) -> str:
        found = list(re.finditer(pattern, text))[number]
        return text[: found.start()] + found.expand(change) + text[found.end() :]

    return edit


CAUGHT = (AssertionError, Race, BadAccess)


def test_the_matmul_is_right_before_it_is_broken():
    matmul(torch.float16, sizes=(64, 64, 160))


@pytest.mark.parametrize("pattern, change, number", [
    (r"wgmma\.wait_group\.sync\.aligned 0;", "", 0),
    (r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;", 0),
    (r"wgmma\.fence\.sync\.aligned;", "", 0),
    (r"wgmma\.commit_group\.sync\.aligned;", "", 0),
    (r"cp\.async\.wait_group\s+\d+;", "", 0),
    (r"(cp\.async\.wait_group\s+\d+;)\s*bar\.sync\s+0;", r"\1", 0),
    (r"(wgmma\.mma_async.*, 1, 1, 0, )1;", r"\g<1>0;", 0),
    (r"(wgmma\.mma_async\S* \{)(%r\d+),(%r\d+)", r"\1\3,\2", 0),
    (r"(or\.b64\s+%rd\d+, %rd\d+, )-9223371899415822336;", r"\g<1>4611686293305294848;", 0),
])  # fmt: skip
def test_a_broken_matmul_is_caught(pattern, change, number):
    with pytest.raises(CAUGHT):
        matmul(torch.float16, sizes=(64, 64, 160), edit=nth(pattern, change, number))


@pytest.mark.parametrize("pattern, change, number", [
    (r"fence\.proxy\.async\.shared::cta;", "", 0),
    (r"wgmma\.fence\.sync\.aligned;", "", 1),
    (r"wgmma\.wait_group\.sync\.aligned 0;", "", 0),
    (r"wgmma\.wait_group\.sync\.aligned 0;", "", 1),
    (r"(\}, \{)(%r\d+),(%r\d+)", r"\1\3,\2", 0),
])  # fmt: skip
def test_a_broken_product_of_a_product_is_caught(pattern, change, number):
    with pytest.raises(CAUGHT):
        twice(torch.bfloat16, nth(pattern, change, number))


@pytest.mark.parametrize("pattern, change, number", [
    (r"mbarrier\.try_wait\S* complete, \[[^;]*;", "setp.eq.s32 complete, 0, 0;", 0),
    (r"wgmma\.wait_group\.sync\.aligned 1;", "", 0),
    (r"wgmma\.wait_group\.sync\.aligned 0;", "", 0),
    (r"cp\.async\.bulk\.wait_group\.read\s+0;", "", -2),
    (r"fence\.proxy\.async\.shared::cta;", "", -1),
    (r"@%p\d+ fence\.proxy\.tensormap::generic\.acquire[^;]*;", "", 0),
    (r"@%p\d+ fence\.proxy\.tensormap::generic\.acquire[^;]*;", "", -1),
])  # fmt: skip
def test_a_broken_persistent_matmul_is_caught(pattern, change, number):
    with pytest.raises(CAUGHT):
        persistent(torch.bfloat16, False, 4, True, nth(pattern, change, number))
