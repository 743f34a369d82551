"""What the kernels refuse, and that it is said once, or raised under strict."""

import logging

import pytest
import torch

from pelt_fast import env, functional
from pelt_fast.ops.common import dispatch as support
from pelt_fast.ops.common.backends import backend

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not env.interpret(), reason="on a CPU, kernels interpreted")


def lora(x=None, rank=4, dtype=torch.float32, a_dtype=None):
    x = torch.randn(6, 16, dtype=dtype) if x is None else x
    a, b = (torch.randn(*s, dtype=a_dtype or x.dtype) for s in ((rank, 16), (12, rank)))
    return functional.lora_linear(x, torch.randn(12, 16).to(x.dtype), None, a, b, scale=1.0)


REFUSED = {
    "a dtype": (lambda: lora(dtype=torch.float64), "float64"),
    "the dtype of a factor": (lambda: lora(a_dtype=torch.float64), "float64"),
    "a rank beyond the table": (lambda: lora(rank=1025), "rank of 1 to 1024, got 1025"),
    "a last dim that is not contiguous": (lambda: lora(torch.randn(16, 6).t()), "has stride 6, not 1"),
    "a prefix beyond the table": (
        lambda: functional.prefix_attention(
            *(torch.randn(1, 1, 3, 8) for _ in range(3)), *(torch.randn(1, 1030, 8) for _ in range(2))),
        "prefix length of 1 to 1024, got 1030",
    ),
    "a head dim": (
        lambda: functional.prefix_attention(
            *(torch.randn(1, 1, 3, 264) for _ in range(3)), *(torch.randn(1, 2, 264) for _ in range(2))),
        "head dim up to 256",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_input_runs_the_plan_and_says_why_once(name, caplog, monkeypatch):
    call, reason = REFUSED[name]
    support._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "pelt_fast"), backend("triton"):
        for _ in range(2):
            assert torch.isfinite(call()).all()
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    monkeypatch.setenv("PELT_FAST_STRICT", "1")
    with backend("triton"), pytest.raises(RuntimeError, match=reason):
        call()


def test_refused_input_gives_the_right_number():
    x = torch.randn(16, 6).t()
    torch.manual_seed(3)
    with backend("triton"):
        y = lora(x)
    torch.manual_seed(3)
    assert torch.allclose(y, lora(x.contiguous()), atol=1e-5)


def test_tensors_on_two_devices_are_named():
    tensors = [torch.empty(2, 2), torch.empty(2, 2, device="meta")]
    assert "cpu" in support.unsupported("lora", tensors, 2)
    with pytest.raises(ValueError, match="lora_a must be on cpu, got meta"):
        a = torch.empty(2, 16, device="meta")
        functional.lora_linear(torch.randn(3, 16), torch.randn(5, 16), None, a, a, scale=1.0)


def test_a_dropout_state_may_be_elsewhere():
    """The memory-efficient kernel keeps it on the CPU: a backward sent to the reference for that
    would draw another mask than the forward."""
    q, rng = torch.empty(1, 1, 4, 8, device="meta"), torch.zeros(2, dtype=torch.int64)
    assert support.unsupported("prefix", [q, q, rng], 4) is None


def test_an_expanded_gradient_stays_on_the_kernels(monkeypatch):
    monkeypatch.setenv("PELT_FAST_STRICT", "1")
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    prefix = [torch.randn(2, 3, 8, requires_grad=True) for _ in range(2)]
    with backend("triton"):
        functional.prefix_attention(q, k, v, *prefix).sum().backward()
    expected = torch.autograd.grad(functional.prefix_attention(q, k, v, *prefix).sum(), prefix)
    assert torch.allclose(prefix[1].grad, expected[1], atol=1e-5)


def test_a_gpu_older_than_sm_80_is_refused(monkeypatch):
    support._too_old.cache_clear()
    monkeypatch.setattr(env, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    plan = support.plan("lora", torch.device("cuda"), dtype=torch.float16)
    support._too_old.cache_clear()
    assert plan.name == "accumulate" and "Tesla T4 is older" in plan.reason


def test_without_triton_the_reason_is_that(monkeypatch):
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    assert "pip install" in support.unsupported("lora", [torch.empty(2, 2)], 2)
    assert "triton is not installed" in support.plan("prefix", torch.device("cuda")).reason


def test_plan_names_the_kernels_where_they_run():
    with backend("triton"):
        assert support.plan("lora", CPU, size=16).name == "triton"
    assert support.plan("lora", CPU, size=16).name == "accumulate"
