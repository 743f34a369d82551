"""The public functions under drawn shapes, strides, dtypes, masks and arguments: numbers within the
budget of fp64, or an error that names an argument; nothing else.

``make fuzz`` draws 20,000 times, ``make test-all`` 200 times a test, ``make test`` 60 times
(PELT_FAST_FUZZ).
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import pelt_fast
from pelt_fast import functional
from pelt_fast.ops.common.activations import ACTIVATIONS

DRAWS = int(os.environ.get("PELT_FAST_FUZZ", "200"))
LOW = (torch.float32, torch.bfloat16, torch.float16)
fuzzed = settings(
    max_examples=DRAWS, deadline=None, derandomize=DRAWS <= 200, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
sizes = st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 31, 64, 65, 130]))
ranks = st.one_of(st.integers(1, 8), st.sampled_from([15, 16, 33, 129]))
drops = st.sampled_from([0.0, 0.0, 0.1, 0.5])


@st.composite
def leading(draw) -> tuple[int, ...]:
    """The dims in front of the last, none of them zero but now and then."""
    dims = draw(st.lists(st.one_of(st.integers(1, 9), st.just(70)), min_size=1, max_size=2))
    return (*dims[:-1], 0) if draw(st.integers(0, 30)) == 0 else tuple(dims)


class Draw:
    """Makes tensors of one example: random values, one dtype, strides of several kinds."""

    def __init__(self, draw):
        self.draw = draw
        self.low = draw(st.sampled_from(LOW))
        self.wide = draw(st.sampled_from([self.low, torch.float32]))
        torch.manual_seed(draw(st.integers(0, 2**31)))

    def frozen(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return self._strided(shape, self.low, scale)

    def trained(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return self._strided(shape, self.wide, scale)

    def maybe(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return tensor if self.draw(st.booleans()) else None

    def _strided(self, shape, dtype, scale) -> torch.Tensor:
        kind = self.draw(st.sampled_from(["plain", "plain", "sliced", "transposed", "expanded"]))
        if kind == "sliced":
            wide = torch.randn(*shape[:-1], shape[-1] + 3) * scale
            return wide.to(dtype)[..., 1 : 1 + shape[-1]]
        if kind == "transposed" and len(shape) > 1:
            return (torch.randn(*shape[:-2], shape[-1], shape[-2]) * scale).to(dtype).mT
        if kind == "expanded" and len(shape) > 1:
            return (torch.randn(1, *shape[1:]) * scale).to(dtype).expand(*shape)
        return (torch.randn(*shape) * scale).to(dtype)


def lora(make: Draw) -> tuple:
    k, n, r = make.draw(sizes), make.draw(sizes), make.draw(ranks)
    tensors = dict(
        x=make.frozen(*make.draw(leading()), k), weight=make.frozen(n, k, scale=k**-0.5),
        bias=make.maybe(make.frozen(n)), lora_a=make.trained(r, k, scale=k**-0.5),
        lora_b=make.trained(n, r, scale=r**-0.5),
    )  # fmt: skip
    return functional.lora_linear, tensors, dict(scale=make.draw(st.floats(-4, 4)),
                                                 dropout_p=make.draw(drops))  # fmt: skip


def _bottleneck(make: Draw, k: int, n: int) -> dict:
    r = make.draw(ranks)
    down, up = make.trained(r, k, scale=k**-0.5), make.trained(n, r, scale=r**-0.5)
    return dict(down_weight=down, down_bias=make.maybe(make.trained(r)), up_weight=up,
                up_bias=make.maybe(make.trained(n)))  # fmt: skip


def adapter(make: Draw) -> tuple:
    k, lead = make.draw(sizes), make.draw(leading())
    settings_ = dict(scale=make.draw(st.floats(-4, 4)), dropout_p=make.draw(drops),
                     activation=make.draw(st.sampled_from(ACTIVATIONS)))  # fmt: skip
    if make.draw(st.booleans()):
        tensors = dict(h=make.frozen(*lead, k), **_bottleneck(make, k, k))
        return functional.sequential_adapter, tensors, settings_
    n = make.draw(sizes)
    tensors = dict(base_out=make.frozen(*lead, n), x=make.frozen(*lead, k))
    return functional.parallel_adapter, tensors | _bottleneck(make, k, n), settings_


def ffn(make: Draw) -> tuple:
    k, f, n = (make.draw(sizes) for _ in range(3))
    lead = make.draw(leading())
    tensors = dict(
        x=make.frozen(*lead, k), in_weight=make.frozen(f, k, scale=k**-0.5),
        in_bias=make.maybe(make.frozen(f)), out_weight=make.frozen(n, f, scale=f**-0.5),
        out_bias=make.maybe(make.frozen(n)), **_bottleneck(make, k, n),
    )  # fmt: skip
    if make.draw(st.booleans()):
        tensors |= dict(gate_weight=make.frozen(f, k, scale=k**-0.5),
                        gate_bias=make.maybe(make.frozen(f)))  # fmt: skip
    if make.draw(st.booleans()):
        tensors["adapter_x"] = make.frozen(*lead, k)
    names = ("dropout_p", "activation_dropout_p", "output_dropout_p")
    return functional.ffn_parallel_adapter, tensors, dict(
        scale=make.draw(st.floats(-4, 4)), activation=make.draw(st.sampled_from(ACTIVATIONS)),
        ffn_activation=make.draw(st.sampled_from(ACTIVATIONS)),
        **{name: make.draw(drops) for name in names},
    )  # fmt: skip


def prefix(make: Draw) -> tuple:
    b, g, group = (make.draw(st.integers(1, 3)) for _ in range(3))
    t, s, d, p = (make.draw(st.integers(1, 20)) for _ in range(4))
    tensors = dict(
        q=make.frozen(b, g * group, t, d), k=make.frozen(b, g, s, d), v=make.frozen(b, g, s, d),
        prefix_k=make.trained(g, p, d), prefix_v=make.trained(g, p, d),
    )  # fmt: skip
    form = make.draw(st.sampled_from([("softmax", "gated"), ("softmax", "add"), ("relu", "add")]))
    mask = None
    if make.draw(st.booleans()):
        mask = torch.rand(make.draw(st.sampled_from([(t, s), (b, 1, t, s), (b, 1, 1, s)]))) > 0.4
        if make.draw(st.booleans()):
            # a row of nothing but the lowest number has no log-sum-exp: it is rounded away
            mask[..., 0] |= form[1] == "add"
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(make.low).min)
            mask = mask.to(make.low)
    return functional.prefix_attention, tensors, dict(
        attn_mask=mask, is_causal=make.draw(st.booleans()), form=form[0], composition=form[1],
        scale=make.draw(st.sampled_from([None, 0.3, 1.0])),
    )  # fmt: skip


def lora_beside(make: Draw) -> tuple:
    """The tensors of ``lora``; the layer computes its own product."""
    _, tensors, arguments = lora(make)

    def run(x, weight, bias, **rest):
        return functional.lora_beside(x, lambda x: F.linear(x, weight, bias), **rest)

    return run, tensors, arguments


def ffn_beside(make: Draw) -> tuple:
    """The tensors of ``ffn``; the layers compute their own products."""
    _, tensors, arguments = ffn(make)

    def run(x, **rest):
        def layer(name):
            weight, bias = (rest.pop(f"{name}_{part}", None) for part in ("weight", "bias"))
            return None if weight is None else lambda x: F.linear(x, weight, bias)

        layers = {f"{name}_layer": layer(name) for name in ("in", "out", "gate")}
        return functional.ffn_adapter_beside(x, **layers, **rest)

    return run, tensors, arguments


def routed(make: Draw) -> tuple:
    """Methods of drawn ranks, a few rows of the batch for each, some of none."""
    count, k, n = make.draw(st.integers(1, 4)), make.draw(sizes), make.draw(sizes)
    routes = make.draw(st.lists(st.integers(-1, count - 1), max_size=6))
    lead = (len(routes) * make.draw(st.sampled_from([1, 2, 40])), make.draw(st.integers(1, 3)))
    tensors = dict(x=make.frozen(*lead, k), base=make.frozen(*lead, n))
    for i in range(count):
        r = make.draw(ranks)
        tensors |= {
            f"down_weights{i}": make.trained(r, k, scale=k**-0.5),
            f"up_weights{i}": make.trained(n, r, scale=r**-0.5),
            f"down_biases{i}": make.maybe(make.trained(r)),
            f"up_biases{i}": make.maybe(make.trained(n)),
        }  # fmt: skip

    def run(x, base, **rest):
        lists = ("down_weights", "up_weights", "down_biases", "up_biases")
        given = {name: [rest.pop(f"{name}{i}") for i in range(count)] for name in lists}
        return functional.routed_beside(x, base, torch.tensor(routes).long(), **given, **rest)

    return run, tensors, dict(
        scales=[make.draw(st.floats(-4, 4)) for _ in range(count)],
        activation=make.draw(st.sampled_from(ACTIVATIONS)),
        input_dropout_p=make.draw(drops), dropout_p=[make.draw(drops) for _ in range(count)],
    )  # fmt: skip


FAMILIES = {"lora": lora, "adapter": adapter, "ffn": ffn, "prefix": prefix}
BESIDE = {"lora beside": lora_beside, "ffn beside": ffn_beside, "routed": routed}
FROZEN = {"weight", "bias", "in_weight", "in_bias", "out_weight", "out_bias", "gate_weight",
          "gate_bias"}  # fmt: skip


def results(function, tensors: dict, arguments: dict, asked: list[str], backend: str) -> dict:
    """Output and the gradients asked for, of one backend and the same masks."""
    leaves = {name: t if t is None else t.detach() for name, t in tensors.items()}
    for name in asked:
        leaves[name] = leaves[name].requires_grad_()
    torch.manual_seed(5)
    with pelt_fast.backend(backend):
        y = function(**leaves, **arguments)
        torch.manual_seed(6)
        dy = torch.randn(y.shape).to(y)
        grads = torch.autograd.grad(y, [leaves[name] for name in asked], dy) if asked else ()
    return {"y": y.detach(), **dict(zip(asked, grads))}


def check(family: str, make: Draw) -> None:
    function, tensors, arguments = (FAMILIES | BESIDE)[family](make)
    trainable = [name for name, t in tensors.items() if t is not None and name not in FROZEN]
    asked = make.draw(st.lists(st.sampled_from(trainable), unique=True))
    before = {name: t.clone() for name, t in tensors.items() if t is not None}
    found = results(function, tensors, arguments, asked, "auto")
    assert all(torch.equal(tensors[name], t) for name, t in before.items()), "an input was changed"
    same = results(function, tensors, arguments, asked, "reference")
    wide = {name: t if t is None else t.double() for name, t in tensors.items()}
    mask = arguments.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        arguments = arguments | dict(attn_mask=mask.double())
    exact = results(function, wide, arguments, asked, "reference")
    for name, wanted in exact.items():
        assert found[name].shape == wanted.shape and found[name].dtype == same[name].dtype
        if wanted.numel() == 0:
            continue
        # what nearly cancels is measured by what was summed: numbers of about 1
        size = wanted.norm().item() + 0.3 * wanted.numel() ** 0.5
        errors = [(t[name].double() - wanted).norm().item() / size for t in (found, same)]
        band = 8 * torch.finfo(make.low).eps
        assert errors[0] <= 4 * errors[1] + band, (name, errors, band)


@pytest.mark.parametrize("family", FAMILIES | BESIDE)
def test_the_numbers_are_right(family):
    @fuzzed
    @given(st.data())
    def run(data):
        check(family, Draw(data.draw))

    run()


@st.composite
def spoiled(draw, tensors: dict, arguments: dict) -> tuple[dict, dict]:
    """One argument made wrong."""
    tensors, arguments = dict(tensors), dict(arguments)
    name = draw(st.sampled_from([name for name, t in tensors.items() if t is not None]))
    value = tensors[name]
    ways = ["dims", "size", "integer", "none", "number", "meta", "p", "scale"]
    way = draw(st.sampled_from(ways))
    if way == "dims":
        tensors[name] = value[None, None, None]
    elif way == "size":
        tensors[name] = torch.cat([value, value[..., :1], value[..., :1]], -1)
    elif way == "integer":
        tensors[name] = value.to(torch.int32)
    elif way == "none":
        tensors[name] = None
    elif way == "number":
        tensors[name] = 3.0
    elif way == "meta":
        tensors[name] = value.to("meta")
    elif way == "p":
        arguments["dropout_p"] = draw(st.sampled_from([-0.1, 1.0, 2.0, float("nan"), "much"]))
    else:
        arguments["scale"] = draw(st.sampled_from([float("nan"), float("inf"), "half"]))
    return tensors, arguments


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_argument_is_named(family):
    @fuzzed
    @given(st.data())
    def run(data):
        make = Draw(data.draw)
        function, tensors, arguments = FAMILIES[family](make)
        tensors, arguments = data.draw(spoiled(tensors, arguments))
        names = {*tensors, *arguments}
        try:
            function(**tensors, **arguments)
        except (TypeError, ValueError) as error:
            text = str(error)
            assert any(name in text for name in names), text

    run()
