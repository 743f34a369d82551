"""The C++ ops: the same bits as the definition, on any thread count, and clear refusals."""

import pytest
import torch

import pelt_fast
from pelt_fast import functional
from pelt_fast.ops.common import chunking as blocks
from pelt_fast.ops.common import native
from pelt_fast.ops.common.dropout import draw_seed, keep_mask, keep_scale, threshold

built = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@built
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start, count", [
    (0, 0), (0, 1), (0, 4096 * 33), (7, 1000), (12345, 255), (2**33 + 5, 513), (256, 256),
    (2**35 - 700, 1500),  # where the draws pass 32 bits
])  # fmt: skip
def test_the_mask_is_the_definitions_bit_for_bit(start, count, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for p in (0.0, 0.1, 0.5, 0.999):
            seed = draw_seed(CPU)[0]
            out = torch.full((count,), float("nan"), dtype=dtype)
            given = native.dropout_factor(out, threshold(p), keep_scale(p), seed, start)
            keep = keep_mask(start, start + count, p, seed)
            assert torch.equal(out, keep.to(dtype).mul_(keep_scale(p)))
            assert given.data_ptr() == out.data_ptr()
    finally:
        torch.set_num_threads(before)


@built
def test_a_block_is_the_same_with_and_without_the_op(monkeypatch):
    seed = draw_seed(CPU)[0]
    rows = slice(3, 40)
    with_op = blocks.drop_factor(rows, 77, 0.1, seed, torch.float32)
    monkeypatch.setattr(native, "why_missing", lambda: "not here")
    assert torch.equal(with_op, blocks.drop_factor(rows, 77, 0.1, seed, torch.float32))


@built
@pytest.mark.parametrize("change, said", [
    (dict(out=torch.zeros(4, 4).t()), "out must be a contiguous CPU tensor"),
    (dict(out=torch.zeros(4, dtype=torch.int32)), "out must be float64, float32, bfloat16"),
    (dict(threshold=-1), "threshold must be in"),
    (dict(threshold=65536), "threshold must be in"),
    (dict(start=-8), "start must be at least 0"),
    (dict(seed=torch.zeros(2)), "seed must be int64"),
    (dict(seed=torch.zeros(3, dtype=torch.int64)), "seed must be int64"),
])  # fmt: skip
def test_bad_arguments_are_named(change, said):
    given = dict(out=torch.zeros(4), threshold=6554, scale=1.1, seed=draw_seed(CPU)[0], start=0)
    with pytest.raises(RuntimeError, match=said):
        native.dropout_factor(**(given | change))


@built
def test_backend_cpp_runs_what_auto_runs():
    x, w = torch.randn(64, 32), torch.randn(16, 32)
    a, b = torch.randn(4, 32), torch.randn(16, 4)
    outputs = []
    for name in ("auto", "cpp"):
        torch.manual_seed(0)
        with pelt_fast.backend(name):
            outputs.append(functional.lora_linear(x, w, None, a, b, scale=2.0, dropout_p=0.1))
    assert torch.equal(*outputs)


def test_without_the_ops_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(native, "why_missing", lambda: "there is no C++ compiler")
    with pytest.raises(RuntimeError, match=r"cannot run here: there is no C\+\+"):
        pelt_fast.backend("cpp")
