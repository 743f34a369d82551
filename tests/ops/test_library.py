"""Schemas, fakes, torch.compile, backends and fallbacks."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import pelt_fast
from pelt_fast import env, functional
from pelt_fast.ops.adapter.op import adapter_bwd, adapter_fwd
from pelt_fast.ops.common import dispatch as support
from pelt_fast.ops.common.backends import active_backend
from pelt_fast.ops.common.dropout import draw_seed
from pelt_fast.ops.lora.op import lora_bwd, lora_fwd
from pelt_fast.ops.prefix_attention.op import (
    prefix_attention_bwd,
    prefix_attention_fwd,
    routed_prefix_bwd,
    routed_prefix_fwd,
)
from pelt_fast.ops.widened_ffn.op import ffn_bwd, ffn_fwd

CPU = torch.device("cpu")
M, K, N, R, F = 6, 10, 8, 3, 14


def randn(*shape, transposed=False):
    """Contiguous, or dense with its two dims swapped in memory."""
    return torch.randn(*reversed(shape)).t() if transposed else torch.randn(*shape)


def lora_arguments(p, transposed):
    seed = draw_seed(CPU)[0] if p else None
    x, weight = randn(M, K, transposed=transposed), randn(N, K, transposed=transposed)
    small = (randn(R, K), randn(N, R), 2.0, p, seed)
    yield lora_fwd, (x, weight, randn(N), *small)
    yield lora_bwd, (randn(M, N), x, randn(M, R), weight, *small, [True] * 3)
    yield lora_bwd, (randn(M, N), x, randn(M, R), weight, *small, [False, True, False])


def adapter_arguments(p, transposed):
    seed = draw_seed(CPU)[0] if p else None
    x, down, up = randn(M, K, transposed=transposed), randn(R, K), randn(N, R)
    for layer_norm in ("none", "in", "out"):
        width = K if layer_norm == "in" else N
        norm = (None, None) if layer_norm == "none" else (randn(width), randn(width))
        settings = (*norm, layer_norm, "relu", 2.0, p, seed)
        for keep in (True, False):
            yield adapter_fwd, (x, randn(M, N), down, randn(R), up, randn(N), *settings, keep)
        needs = [True] * 5 + [layer_norm != "none"] * 2
        small = (down, randn(R), up, randn(N))
        arguments = (randn(M, N), x, randn(M, R), *small, *settings, False, needs)
        yield adapter_bwd, arguments


def ffn_arguments(p, transposed):
    seed = draw_seed(CPU, 3) if p else None
    x, in_weight, out_weight = randn(M, K, transposed=transposed), randn(F, K), randn(N, F)
    down, up, settings = randn(R, K), randn(N, R), ("gelu", "relu", 2.0, p, p, p, seed)
    for gate in (None, randn(F, K)):
        rows = F * (1 if gate is None else 2) + 16
        for packed in ((None, None), (randn(rows, K), randn(N, F + 16))):
            bias = None if gate is None else randn(F)
            inner = (in_weight, randn(F), gate, bias, out_weight, randn(N))
            for own in (None, randn(M, K)):
                arguments = (x, own, *inner, down, randn(R), up, randn(N), *packed, *settings)
                yield ffn_fwd, (*arguments, True)
                yield ffn_fwd, (*arguments, False)
                pre = ffn_fwd(*arguments, True, backend="auto")[1]
                weights = (in_weight, gate, out_weight, down, up, *packed)
                needs = [True] * 5 + [own is not None]
                read = x if own is None else own
                yield ffn_bwd, (randn(M, N), read, pre, *weights, *settings, own is not None, needs)
                packed = (None, packed[1])  # the stacked weights are of one input


def prefix_arguments(p, transposed):
    seed = draw_seed(CPU, 2) if p else None
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    if transposed:
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    pk, pv, mask = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.rand(2, 1, 5, 7) > 0.2
    for form, composition in (("softmax", "gated"), ("softmax", "add"), ("relu", "add")):
        settings = (mask, True, 0.3, form, composition, p, seed)
        yield prefix_attention_fwd, (q, k, v, pk, pv, *settings)
        saved = prefix_attention_fwd(q, k, v, pk, pv, *settings, backend="auto")
        saved = (q, k, v, pk, pv, *saved)
        yield prefix_attention_bwd, (torch.randn_like(q), *saved, *settings, [True] * 5)


def routed_arguments(p, transposed):
    routes, lengths = torch.tensor([1, -1]), [2, 1]
    for op, arguments in prefix_arguments(p, transposed):
        if op is prefix_attention_fwd:
            yield routed_prefix_fwd, (*arguments[:5], routes, lengths, *arguments[5:])
            continue
        do, *tensors = arguments
        yield routed_prefix_bwd, (do, *tensors[:5], routes, lengths, *tensors[5:])


FAMILIES = [lora_arguments, adapter_arguments, ffn_arguments, prefix_arguments, routed_arguments]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_opcheck(family, p, transposed):
    for op, arguments in family(p, transposed):
        opcheck(op.dispatched, arguments)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_ops_run_on_fake_cuda_tensors_without_a_gpu(family, p):
    for op, arguments in family(p, False):
        expected = op(*arguments, backend="auto")
        with FakeTensorMode() as mode:
            fake = [
                torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")
                if isinstance(a, torch.Tensor) else a
                for a in arguments
            ]  # fmt: skip
            outputs = op.dispatched(*fake)
        assert mode is not None
        for output, real in zip(outputs, expected, strict=True):
            assert output.device.type == "cuda"
            assert output.shape == real.shape and output.dtype == real.dtype


def test_functions_run_on_fake_cuda_tensors():
    """Without a gradient: a CPU build of torch aborts as soon as autograd records a CUDA device;
    the backward ops are run above."""
    with FakeTensorMode():

        def make(*s):
            return torch.empty(*s, device="cuda")

        frozen = torch.empty(N, K, device="cuda")
        y = functional.lora_linear(make(2, M, K), frozen, None, make(R, K), make(N, R), scale=1.0,
                                   dropout_p=0.1)  # fmt: skip
        q, prefix = make(2, 4, 5, 8), make(2, 3, 8)
        kv = make(2, 2, 7, 8)
        o = functional.prefix_attention(q, kv, kv, prefix, prefix, is_causal=True)
    assert y.shape == (2, M, N) and y.device.type == "cuda"
    assert o.shape == q.shape and o.device.type == "cuda"


def compiled_cases():
    weight, bias = torch.randn(N, K), torch.randn(N)
    a, b = torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True)
    down, up = torch.randn(R, K, requires_grad=True), torch.randn(K, R, requires_grad=True)
    inner = (torch.randn(F, K), torch.randn(F), torch.randn(K, F), torch.randn(K))
    prefix = [torch.randn(2, 3, 8, requires_grad=True) for _ in range(2)]
    p = 0.1
    yield (
        "lora",
        lambda x: functional.lora_linear(x, weight, bias, a, b, scale=2.0, dropout_p=p),
        (K,),
    )
    yield (
        "sequential",
        lambda x: functional.sequential_adapter(x, down, None, up, None, dropout_p=p),
        (K,),
    )
    yield "ffn", lambda x: functional.ffn_parallel_adapter(
        x, *inner, down, None, up, None, scale=2.0, output_dropout_p=p), (K,)  # fmt: skip

    def attend(x):
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = q[:, :2], q[:, 2:]
        return functional.prefix_attention(q, k, v, *prefix, is_causal=True).transpose(1, 2)

    yield "prefix", attend, (32,)


@pytest.mark.quick(every=3)
@pytest.mark.parametrize(
    "name, function, width", list(compiled_cases()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_compiles_whole_forward_and_backward_without_recompiling(name, function, width):
    torch._dynamo.reset()
    count = 0

    def counting(graph, _):
        nonlocal count
        count += 1
        return graph.forward

    def step(x):
        return function(x).sin()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for batch, length in ((2, 5), (3, 9), (5, 4)):
        x = torch.randn(batch, length, *width, requires_grad=True)
        torch.manual_seed(1)
        y = compiled(x)
        y.square().sum().backward()
        assert y.shape[:2] == (batch, length) and torch.isfinite(x.grad).all()
        assert x.grad.abs().sum() > 0
    torch._dynamo.reset()
    torch.compile(step, fullgraph=True, dynamic=True, backend=counting)(x)
    for batch, length in ((3, 9), (5, 4)):
        torch.compile(step, fullgraph=True, dynamic=True, backend=counting)(
            torch.randn(batch, length, *width, requires_grad=True)
        )
    assert count == 1, f"{name} recompiled"


def test_compiled_equals_eager():
    torch._dynamo.reset()
    weight, a, b = torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
    a.requires_grad_()

    def function(x):
        return functional.lora_linear(x, weight, None, a, b, scale=2.0).tanh()

    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        x = torch.linspace(-1, 1, M * K).view(M, K).requires_grad_()
        results.append(torch.autograd.grad(run(x).sum(), (x, a)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, atol=1e-5)


def test_backend_is_a_setter_and_a_context_manager():
    with pelt_fast.backend("reference"):
        assert active_backend() == "reference"
        with pelt_fast.backend("auto"):
            assert active_backend() == "auto"
        assert active_backend() == "reference"
    assert active_backend() == "auto"
    before = pelt_fast.backend("reference")
    assert active_backend() == "reference"
    before.__exit__()
    assert active_backend() == "auto"


def test_backward_runs_on_the_backend_of_its_forward(monkeypatch):
    called, _reference = [], lora_bwd.reference
    monkeypatch.setattr(lora_bwd, "reference", lambda *a: called.append(1) or _reference(*a))
    x, a = torch.randn(M, K, requires_grad=True), torch.randn(R, K, requires_grad=True)
    with pelt_fast.backend("reference"):
        y = functional.lora_linear(x, torch.randn(N, K), None, a, torch.randn(N, R), scale=1.0)
    y.sum().backward()
    assert called


@pytest.mark.parametrize("name, error", [("tritn", ValueError), ("triton", RuntimeError)])
def test_backend_refuses_what_is_not_there(name, error, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(env, "has_gpu", lambda: False)
    with pytest.raises(error, match="backend"):
        pelt_fast.backend(name)
    assert active_backend() == "auto"


def test_fallback_says_its_reason_once_and_strict_raises_it(caplog, monkeypatch):
    device = torch.device("xpu")
    reason = support.plan("prefix", device).reason
    assert "xpu" in reason
    support._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "pelt_fast"):
        support.announce("prefix", device)
        support.announce("prefix", device)
    assert len(caplog.records) == 1 and reason in caplog.text
    monkeypatch.setenv("PELT_FAST_STRICT", "1")
    with pytest.raises(RuntimeError, match="PELT_FAST_STRICT"):
        support.announce("prefix", device)
    support.announce("lora", torch.device("cpu"))
