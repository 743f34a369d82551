"""What a site keeps from one step of a generate to the next: the same numbers, a few calls, dropped at
the end."""

import copy
import gc
import sys
import weakref
from functools import partial

import accelerate
import pytest
import torch
from transformers import LogitsProcessor

import pelt_fast
from pelt_fast.injection.generate import generating
from pelt_fast.modules.adapter import Bottleneck
from pelt_fast.modules.generation import generation, one_generate
from pelt_fast.modules.lora import LoRALinear
from pelt_fast.ops.common import native
from tests.models.test_generate import tokens
from tests.models.test_parity import small_method
from tests.small import inputs, llama, randomise
from tests.threads import together

WITH_STEPS = ["lora", "houlsby", "scaled_parallel_adapter", "prefix", "mam"]
pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))


def built(method):
    """A model whose heads are as wide as the C++ attention asks."""
    torch.manual_seed(0)
    return randomise(pelt_fast.inject(llama(hidden_size=64), small_method(method))).eval()


def logits(model, ids, cut=4, rows=slice(None)):
    """Logits of each token from ``cut`` on, one step each behind a prefill, in one generate."""
    found, cache = [], None
    with torch.no_grad(), generating(model):
        for first, last in ((0, cut), *((i, i + 1) for i in range(cut, ids.shape[1]))):
            out = model(ids[rows, first:last], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[:, -1:])
    return torch.cat(found, 1)


@pytest.mark.parametrize("batch", [2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", WITH_STEPS)
def test_steps_give_the_numbers_of_a_whole_forward(method, dtype, batch):
    model = built(method)
    ids = inputs(model, batch=batch, length=12)["input_ids"]
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids).logits[:, 3:]
        model = model.to(dtype)
        whole = model(ids).logits[:, 3:]
    ours, theirs = ((found.double() - exact).abs().max() for found in (logits(model, ids), whole))
    assert ours <= 4 * theirs + 1e-6 * exact.abs().max()


class Kept(LogitsProcessor):
    """Between two steps: how many sites keep a step."""

    def __init__(self):
        self.counts = []

    def __call__(self, ids, scores):
        calls = [] if generation.kept is None else generation.kept.values()
        self.counts.append(sum(isinstance(call, tuple) and callable(call[-1]) for call in calls))
        return scores


@pytest.mark.parametrize("method, kinds", [
    ("lora", LoRALinear), ("houlsby", Bottleneck), ("scaled_parallel_adapter", Bottleneck),
])  # fmt: skip
def test_every_site_keeps_its_step(method, kinds):
    model, kept = built(method), Kept()
    tokens(model, inputs(model, batch=2, length=24), logits_processor=[kept])
    sites = sum(isinstance(module, kinds) for module in model.modules())
    assert sites and kept.counts[0] == 0, "the prompt is no step"
    assert set(kept.counts[2:]) == {sites}


def calls_of(function, *args) -> int:
    """Python and C functions that a call enters."""
    count = 0

    def counts(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counts)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("method, kind, limit", [
    ("lora", LoRALinear, 20), ("houlsby", Bottleneck, 50),
    ("scaled_parallel_adapter", Bottleneck, 40),
])  # fmt: skip
def test_calls_of_a_step_are_few(method, kind, limit):
    """In a decoder's step the calls between a site and its op cost more than the products."""
    model = built(method)
    site = next(module for module in model.modules() if isinstance(module, kind))
    x = torch.randn(1, 1, model.config.hidden_size)
    with torch.no_grad(), generating(model):
        site.forward(x)
        assert calls_of(site.forward, x) <= limit


def test_a_prefix_keeps_its_step():
    model, kept = built("prefix"), Kept()
    tokens(model, inputs(model), logits_processor=[kept])
    assert set(kept.counts[2:]) == {model.config.num_hidden_layers}


@pytest.mark.parametrize("method", WITH_STEPS)
def test_a_change_between_two_generates_is_noticed(method):
    model = built(method)
    ids = inputs(model, batch=2, length=8)["input_ids"]
    before = logits(model, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    after = logits(model, ids)
    assert not torch.allclose(before, after)
    with pelt_fast.disabled(model):
        base = logits(model, ids)
    assert not torch.allclose(base, after)
    first = model.model.layers[0].mlp.up_proj
    handle = first.register_forward_hook(lambda module, args, y: 2 * y)
    hooked = logits(model, ids)
    handle.remove()
    assert not torch.allclose(hooked, after)
    assert torch.equal(logits(model, ids), after)


@pytest.mark.parametrize("method", WITH_STEPS)
def test_the_base_in_the_middle_of_a_generate(method):
    """``disabled`` acts at once: contrastive decoding asks the base in each step."""
    model = built(method)
    ids = inputs(model, batch=2, length=8)["input_ids"]
    with pelt_fast.disabled(model), torch.no_grad():
        wanted = model(ids[:, :1]).logits
    with torch.no_grad(), generating(model):
        for _ in range(3):
            ours = model(ids[:, :1]).logits
        with pelt_fast.disabled(model):
            assert torch.equal(model(ids[:, :1]).logits, wanted)
        assert torch.equal(model(ids[:, :1]).logits, ours)


@pytest.mark.parametrize("method", WITH_STEPS)
def test_another_number_of_rows_in_the_same_generate(method):
    model = built(method)
    ids = inputs(model, batch=12, length=1)["input_ids"]
    with torch.no_grad():
        wanted = model(ids).logits
        with generating(model):
            for rows in (2, 2, 3, 12, 2, 12, 8, 8):
                found = model(ids[:rows]).logits
                assert torch.allclose(found, wanted[:rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method, kind", [("lora", LoRALinear), ("mam", Bottleneck),
                                          ("houlsby", Bottleneck)])  # fmt: skip
def test_rows_that_are_not_contiguous_run_as_others(method, kind):
    """Inputs of the same shape in another layout, in a kept step too."""
    site = next(module for module in built(method).modules() if isinstance(module, kind))
    wide = torch.randn(64, 2)
    with torch.no_grad():
        wanted = site.forward(wide.t().contiguous())
        assert torch.allclose(site.forward(wide.t()), wanted, atol=1e-6)
        with one_generate():
            assert torch.equal(site.forward(wide.t().contiguous()), wanted)
            assert torch.allclose(site.forward(wide.t()), wanted, atol=1e-6)


def test_a_base_whose_rows_are_not_contiguous():
    """A parallel adapter's base in any layout: the C++ update of a few rows asks for rows."""
    down, up, x, base = torch.randn(3, 8), torch.randn(6, 3), torch.randn(4, 8), torch.randn(6, 4)
    adapter = pelt_fast.functional.parallel_adapter
    with torch.no_grad():
        wanted = adapter(base.t().contiguous(), x, down, None, up, None)
        assert torch.equal(adapter(base.t(), x, down, None, up, None), wanted)


@pytest.mark.parametrize("method", WITH_STEPS)
def test_gradients_are_taken_in_a_generate_too(method):
    model = built(method)
    ids = inputs(model, batch=2, length=1)["input_ids"]

    def gradients():
        model.zero_grad()
        model(ids).logits.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradients()
    with generating(model):
        with torch.no_grad():
            for _ in range(3):
                model(ids)
        assert wanted and all(map(torch.allclose, gradients(), wanted))


@pytest.mark.parametrize("method", WITH_STEPS)
def test_an_offloaded_model_generates_the_same(method):
    model = built(method)
    batch = inputs(model)
    wanted = tokens(model, batch)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(tokens(model, batch), wanted)


def test_nothing_is_kept_afterwards():
    model = built("mam")
    ids = inputs(model, batch=2, length=6)["input_ids"]
    logits(model, ids)
    assert generation.kept is None
    with pytest.raises(RuntimeError, match="stop"), torch.no_grad(), generating(model):
        model(ids[:, :1])
        assert generation.kept
        raise RuntimeError("stop")
    assert generation.kept is None
    weights = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not [ref for ref in weights if ref() is not None]


def test_generates_of_two_threads_are_apart():
    model = built("mam")
    batches = [inputs(model, batch=rows, length=10)["input_ids"] for rows in (1, 2, 3, 2)]
    wanted = [logits(model, ids) for ids in batches]
    found = together([partial(logits, model, ids) for ids in batches])
    assert all(map(torch.equal, found, wanted))
