"""Every hand-derived backward against finite differences, in fp64, on shapes nobody likes."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from pelt_fast.ops.adapter.op import AdapterFunction
from pelt_fast.ops.beside.op import ActivationFunction, DownFunction, UpFunction
from pelt_fast.ops.common.activations import ACTIVATIONS, activate, derivative
from pelt_fast.ops.common.backends import backend
from pelt_fast.ops.common.dropout import draw_seed
from pelt_fast.ops.common.learned_scale import fold_scale, fold_scale_backward
from pelt_fast.ops.lora.op import LoRALinearFunction
from pelt_fast.ops.prefix_attention.op import PrefixAttentionFunction
from pelt_fast.ops.widened_ffn.op import WidenedFFNFunction

CPU = torch.device("cpu")


def leaf(*shape, needs=True):
    """A sliced view of a larger tensor: rows are strided."""
    wide = (
        torch.randn(*shape[:-1], shape[-1] + 3, dtype=torch.float64) if shape else torch.randn(())
    )
    return wide[..., : shape[-1]].detach().requires_grad_(needs)


def check(function, arguments):
    with backend("reference"):
        assert gradcheck(function, arguments, fast_mode=False, atol=1e-6)


SHAPES = [(1, 1, 1, 1), (1, 7, 5, 3), (5, 11, 3, 16), (3, 2, 7, 100)]  # M, K, N, R


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("m, k, n, r", SHAPES)
def test_lora_backward_matches_finite_differences(m, k, n, r, p):
    seed = draw_seed(CPU)[0] if p else None
    tensors = (leaf(m, k), leaf(n, k), leaf(n), leaf(r, k), leaf(n, r))
    check(LoRALinearFunction.apply, (*tensors, 1.7, p, seed))


NEEDS = [needs for needs in itertools.product([True, False], repeat=5) if any(needs)]


@pytest.mark.parametrize("needs", NEEDS)
def test_lora_backward_gives_what_is_needed_and_nothing_else(needs):
    shapes = [(4, 5), (3, 5), (3,), (2, 5), (3, 2)]
    tensors = [leaf(*s, needs=need) for s, need in zip(shapes, needs, strict=True)]
    check(LoRALinearFunction.apply, (*tensors, 0.5, 0.3, draw_seed(CPU)[0]))
    y = LoRALinearFunction.apply(*tensors, 0.5, 0.0, None)
    y.sum().backward()
    assert [t.grad is not None for t in tensors] == list(needs)


def adapter_tensors(m, k, n, r, parallel, layer_norm, bias=True, needs=None):
    width = k if layer_norm == "in" else n
    shapes = [(m, k), (m, n), (r, k), (r,), (n, r), (n,), (width,), (width,)]
    needs = needs or [True] * 8
    tensors = [leaf(*s, needs=need) for s, need in zip(shapes, needs, strict=True)]
    tensors[1] = tensors[1] if parallel else None
    if not bias:
        tensors[3] = tensors[5] = None
    if layer_norm == "none":
        tensors[6] = tensors[7] = None
    return tensors


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("layer_norm", ["none", "in", "out"])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("m, k, n, r", [(1, 7, 5, 3), (5, 11, 3, 16), (3, 2, 7, 100), (2, 5, 5, 1)])
def test_adapter_backward_matches_finite_differences(m, k, n, r, parallel, layer_norm, p):
    n = n if parallel else k
    tensors = adapter_tensors(m, k, n, r, parallel, layer_norm)
    seed = draw_seed(CPU)[0] if p else None
    check(AdapterFunction.apply, (*tensors, layer_norm, "tanh", 1.3, p, seed))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_adapter_backward_for_every_activation(activation):
    tensors = adapter_tensors(3, 4, 5, 2, True, "none", bias=False)
    check(AdapterFunction.apply, (*tensors, "none", activation, 1.0, 0.0, None))


@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize("layer_norm", ["in", "out"])
def test_adapter_backward_with_one_tensor_trainable(which, layer_norm):
    needs = [i == which for i in range(8)]
    tensors = adapter_tensors(3, 4, 5, 2, True, layer_norm, needs=needs)
    check(AdapterFunction.apply, (*tensors, layer_norm, "silu", 1.0, 0.2, draw_seed(CPU)[0]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivative_is_autograds(activation):
    t = torch.linspace(-4, 4, 41, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(activate(activation, t).sum(), t)
    assert torch.allclose(derivative(activation, t.detach()), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (6,)])
@pytest.mark.parametrize("bias", [True, False])
def test_learned_scale_has_the_closed_form_gradient(shape, bias):
    scale = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    up, up_bias = leaf(6, 3), leaf(6) if bias else None
    folded = fold_scale(scale, up, up_bias)
    d_up, d_bias = torch.randn(6, 3).double(), torch.randn(6).double()
    outputs = [(folded[0] * d_up).sum()] + ([(folded[1] * d_bias).sum()] if bias else [])
    wanted = [scale, up] + ([up_bias] if bias else [])
    expected = torch.autograd.grad(sum(outputs), wanted)
    actual = fold_scale_backward(d_up, d_bias if bias else None, scale, up, up_bias)
    for a, e in zip(actual, expected, strict=False):
        assert torch.allclose(a, e, atol=1e-12)


def ffn_arguments(m, k, inner, n, r, gated, bias, p, needs=(True,) * 5, separate=False):
    def frozen(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    gate = (frozen(inner, k), frozen(inner) if bias else None) if gated else (None, None)
    small = [leaf(r, k, needs=needs[1]), leaf(r, needs=needs[2]), leaf(n, r, needs=needs[3]),
             leaf(n, needs=needs[4])]  # fmt: skip
    if not bias:
        small[1] = small[3] = None
    return (
        leaf(m, k, needs=needs[0]), leaf(m, k) if separate else None, frozen(inner, k), frozen(inner) if bias else None, *gate,
        frozen(n, inner), frozen(n) if bias else None, *small, None, None, "gelu", "silu", 1.4, p, p, p,
        draw_seed(CPU, 3) if p else None,
    )  # fmt: skip


def unpacked(arguments):
    """The op's arguments as its Function's: with no buffers of a site, behind the packed weights."""
    return (*arguments[:14], None, *arguments[14:])


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m, k, n, r", SHAPES)
def test_ffn_backward_matches_finite_differences(m, k, n, r, gated, p):
    check(WidenedFFNFunction.apply, unpacked(ffn_arguments(m, k, 5, n, r, gated, m != 1, p)))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("needs", NEEDS)
def test_ffn_backward_gives_what_is_needed(needs, separate):
    arguments = ffn_arguments(3, 4, 5, 3, 2, False, True, 0.2, needs, separate)
    check(WidenedFFNFunction.apply, unpacked(arguments))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("gated", [False, True])
def test_ffn_backward_of_an_adapter_on_another_tensor(gated, p):
    arguments = ffn_arguments(5, 4, 5, 3, 2, gated, True, p, separate=True)
    check(WidenedFFNFunction.apply, unpacked(arguments))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("m, k, n, r", SHAPES)
def test_both_halves_beside_a_layer_match_finite_differences(m, k, n, r, p):
    seeds = draw_seed(CPU, 2) if p else (None, None)
    check(DownFunction.apply, (leaf(m, k), leaf(r, k), leaf(r), p, seeds[0]))
    tensors = (leaf(m, n), leaf(m, r), leaf(n, r), leaf(n))
    for activation in ("identity", "tanh"):
        check(UpFunction.apply, (*tensors, activation, 1.3, p, seeds[0], p, seeds[1]))


@pytest.mark.parametrize("needs", itertools.product([True, False], repeat=4))
def test_both_halves_beside_a_layer_give_what_is_needed(needs):
    if not any(needs):
        return
    seed = draw_seed(CPU)[0]
    up = [leaf(*s, needs=need) for s, need in zip([(4, 3), (4, 2), (3, 2), (3,)], needs)]
    for activation in ("identity", "silu"):
        check(UpFunction.apply, (*up, activation, 0.5, 0.0, None, 0.3, seed))
    if any(needs[:3]):
        down = [leaf(*s, needs=need) for s, need in zip([(4, 5), (2, 5), (2,)], needs)]
        check(DownFunction.apply, (*down, 0.3, seed))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_beside_layers_matches_finite_differences(activation, gated, p):
    seed, gate = draw_seed(CPU)[0] if p else None, leaf(3, 7) if gated else None
    check(ActivationFunction.apply, (leaf(3, 7), gate, activation, p, seed))


HEADS = [  # B, H, Hkv, T, S, D, P
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 2, 3, 5, 2, 3),
    (1, 3, 1, 5, 3, 4, 1),
    (2, 2, 2, 1, 7, 3, 16),
]
FORMS = [("softmax", "gated"), ("softmax", "add"), ("relu", "add")]


def head_tensors(b, h, g, t, s, d, length, needs=(True,) * 5):
    shapes = [(b, h, t, d), (b, g, s, d), (b, g, s, d), (g, length, d), (g, length, d)]
    return [leaf(*shape, needs=need) for shape, need in zip(shapes, needs, strict=True)]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form, composition", FORMS)
@pytest.mark.parametrize("sizes", HEADS, ids=str)
def test_prefix_backward_matches_finite_differences(sizes, form, composition, causal, p):
    seed = draw_seed(CPU, 2) if p else None
    tensors = head_tensors(*sizes)
    settings = (None, causal, 0.7, form, composition, p, seed)
    check(lambda *t: PrefixAttentionFunction.apply(*t, *settings), tensors)


# an added context that sees only finfo.min is a uniform softmax, not an empty row
MASKED = [(*form, kind) for form in FORMS for kind in ("bool", "additive")]


@pytest.mark.parametrize("form, composition, kind", [*MASKED, ("softmax", "gated", "finfo.min")])
def test_prefix_backward_with_masks_and_rows_that_see_nothing(form, composition, kind):
    b, h, g, t, s, d, length = 2, 2, 1, 3, 4, 3, 2
    mask = torch.rand(b, 1, t, s) > 0.4
    mask[0, 0, 1] = False
    mask[:, :, 0, 0] = True
    if kind != "bool":
        low = -float("inf") if kind == "additive" else torch.finfo(torch.float64).min / 4
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, low)
    settings = (mask, False, 0.7, form, composition, 0.0, None)
    check(
        lambda *x: PrefixAttentionFunction.apply(*x, *settings),
        head_tensors(b, h, g, t, s, d, length),
    )


@pytest.mark.parametrize("needs", NEEDS)
def test_prefix_backward_gives_what_is_needed(needs):
    tensors = head_tensors(1, 2, 1, 3, 2, 2, 2, needs=needs)
    settings = (None, True, 0.7, "softmax", "gated", 0.0, None)
    check(lambda *t: PrefixAttentionFunction.apply(*t, *settings), tensors)
