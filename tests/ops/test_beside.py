"""The ops beside a frozen layer: schemas, what is saved, in which order gradients are added, errors."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from benchmarks.common import saved_bytes
from pelt_fast import functional
from pelt_fast.ops.beside.op import act_bwd, act_fwd, down_bwd, down_fwd, up_bwd, up_fwd
from pelt_fast.ops.common.dropout import draw_seed

CPU = torch.device("cpu")
M, K, N, R, F = 6, 10, 8, 3, 14
FLOAT, SEED = 4, 16  # bytes


def calls(p):
    """Each op with its arguments, all forms."""
    seeds = draw_seed(CPU, 2) if p else (None, None)
    x, down, up, t = torch.randn(M, K), torch.randn(R, K), torch.randn(N, R), torch.randn(M, R)
    base, dy, z = torch.randn(M, N), torch.randn(M, N), torch.randn(M, F)
    for bias in (None, torch.randn(R)):
        yield down_fwd, (x, down, bias, p, seeds[0])
    for passed in (None, torch.randn(M, K)):
        for needs in ([True] * 3, [True, False, False], [False, True, False]):
            yield down_bwd, (t, x, passed, down, p, seeds[0], needs)
    for activation in ("identity", "gelu"):
        transform = (activation, 2.0, p, seeds[0], p, seeds[1])
        for bias in (None, torch.randn(N)):
            yield up_fwd, (base, t, up, bias, *transform)
        for needs in ([bool(p), True, True, True], [False, True, False, False]):
            yield up_bwd, (dy, t, up, *transform, needs)
    for gate in (None, torch.randn(M, F)):
        yield act_fwd, (z, gate, "silu", p, seeds[0])
        yield act_bwd, (torch.randn(M, F), z, gate, "silu", p, seeds[0])


def test_opcheck():
    for op, arguments in calls(0.1):
        opcheck(op.dispatched, arguments)
    for op, arguments in dict(calls(0.0)).items():
        opcheck(op.dispatched, arguments)


def test_ops_run_on_fake_cuda_tensors_without_a_gpu():
    for op, arguments in calls(0.1):
        expected = op(*arguments, backend="auto")
        with FakeTensorMode():
            made = [
                torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")
                if isinstance(a, torch.Tensor) else a
                for a in arguments
            ]  # fmt: skip
            outputs = op.dispatched(*made)
        pairs = zip(several(outputs), several(expected), strict=True)
        for output, real in pairs:
            assert output.device.type == "cuda"
            assert output.shape == real.shape and output.dtype == real.dtype


def several(result):
    return result if isinstance(result, tuple) else (result,)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs).requires_grad_(False)


def factors(a=True, b=True):
    return (nn.Parameter(torch.randn(R, K), requires_grad=a),
            nn.Parameter(torch.randn(N, R), requires_grad=b))  # fmt: skip


def bottleneck():
    return [nn.Parameter(torch.randn(*s)) for s in ((R, K), (R,), (N, R), (N,))]


class Counting(nn.Module):
    """A layer that only it can read, with a backward of its own; it saves no activation."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, rows, scale):
            ctx.save_for_backward(rows, scale)
            return x @ (rows * scale).to(x.dtype).t()

        @staticmethod
        def backward(ctx, dy):
            rows, scale = ctx.saved_tensors
            return dy @ (rows * scale).to(dy.dtype), None, None

    def __init__(self, inputs, outputs):
        super().__init__()
        self.register_buffer("rows", torch.randint(-127, 127, (outputs, inputs), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(outputs, 1) / 127)

    def forward(self, x):
        return self.Product.apply(x, self.rows, self.scale)

    def plain(self):
        layer = linear(self.rows.shape[1], self.rows.shape[0])
        layer.weight.copy_(self.rows * self.scale)
        return layer


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    "a, b, expected", [(True, True, K + R), (True, False, K), (False, True, R), (False, False, 0)]
)
def test_lora_saves_beside_a_layer_what_it_saves_on_a_plain_one(p, a, b, expected):
    x, small, layer = torch.randn(M, K, requires_grad=True), factors(a, b), Counting(K, N)
    known = [*small, *layer.buffers()]
    kept = saved_bytes(
        lambda: functional.lora_beside(x, layer, *small, scale=1.0, dropout_p=p), known
    )
    assert kept == M * expected * FLOAT + (SEED if p else 0)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_an_ffn_saves_beside_its_layers_what_the_widened_block_saves(p, gated, separate):
    x, own = torch.randn(M, K, requires_grad=True), torch.randn(M, K, requires_grad=True)
    first, last, small = Counting(K, F), Counting(F, N), bottleneck()
    gate = Counting(K, F) if gated else None
    layers = [layer for layer in (first, gate, last) if layer is not None]
    known = [*small, *(buffer for layer in layers for buffer in layer.buffers())]
    kept = saved_bytes(
        lambda: functional.ffn_adapter_beside(
            x, first, last, *small, adapter_x=own if separate else None, gate_layer=gate, scale=2.0,
            dropout_p=p, activation_dropout_p=p, output_dropout_p=p,
        ), known,
    )  # fmt: skip
    assert kept == M * (K + (2 * F if gated else F) + R) * FLOAT + (3 * SEED if p else 0)


def test_the_gradient_of_x_is_one_tensor_that_the_layers_own_was_added_to():
    """Nothing of x's size is summed by autograd: x has one consumer."""
    x, layer = torch.randn(M, K, requires_grad=True), Counting(K, N)
    seen = []
    y = functional.lora_beside(x, layer, *factors(), scale=1.0)
    layers_part = y.grad_fn.next_functions[0][0]
    while layers_part is not None:
        seen.append(layers_part.name())
        layers_part = next((f for f, _ in layers_part.next_functions if f is not None), None)
    assert "DownFunctionBackward" in " ".join(seen)
    assert seen[-1] == "torch::autograd::AccumulateGrad"


def test_a_layer_has_nothing_to_differentiate_if_x_has_not():
    seen = []

    def layer(x):
        seen.append(x.requires_grad)
        return x @ torch.ones(K, N)

    small = factors()
    y = functional.lora_beside(torch.randn(M, K), layer, *small, scale=1.0)
    y.sum().backward()
    assert seen == [False] and all(p.grad is not None for p in small)


def test_the_layers_output_is_never_written_to():
    """A layer may keep its output, or need it in backward."""
    kept = []

    def layer(x):
        kept.append(x.mul(2)[:, :N].exp())  # exp saves its result
        return kept[-1]

    x, small = torch.randn(M, K, requires_grad=True), factors()
    y = functional.lora_beside(x, layer, *small, scale=1.0)
    assert torch.equal(kept[0], x.mul(2)[:, :N].exp()) and not torch.equal(y, kept[0])
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_may_compute_in_another_dtype_than_its_input(dtype, wide):
    """bf16 compute over nf4: the update is added in the dtype of the layer's output."""
    layer, x = Counting(K, N), torch.randn(M, K, dtype=dtype, requires_grad=True)
    small = [p.detach().to(wide).requires_grad_() for p in factors()]
    y = functional.lora_beside(x, lambda x: layer(x).bfloat16(), *small, scale=2.0, dropout_p=0.2)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == dtype
    assert all(p.grad.dtype == wide and torch.isfinite(p.grad).all() for p in small)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_the_same_mask_again(reentrant):
    x, layer, small = torch.randn(M, K, requires_grad=True), Counting(K, N), factors()

    def step(x):
        return functional.lora_beside(x, layer, *small, scale=2.0, dropout_p=0.3)

    found = []
    for run in (step, lambda x: checkpoint(step, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        x.grad, small[0].grad = None, None
        run(x).square().sum().backward()
        found.append((x.grad.clone(), small[0].grad.clone()))
    for once, again in zip(*found, strict=True):
        assert torch.equal(once, again)


def test_both_functions_compile_whole_and_equal_eager():
    torch._dynamo.reset()
    layer, first, last = linear(K, N), linear(K, F), linear(F, N)
    small, ffn = factors(), bottleneck()

    def step(x):
        y = functional.lora_beside(x, layer, *small, scale=2.0)
        return y.tanh() + functional.ffn_adapter_beside(x, first, last, *ffn, scale=2.0)

    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = torch.linspace(-1, 1, M * K).view(M, K).requires_grad_()
        found.append(torch.autograd.grad(run(x).sum(), (x, *small, *ffn)))
    for eager, compiled in zip(*found, strict=True):
        assert torch.allclose(eager, compiled, atol=1e-4)


def test_wrong_arguments_are_named():
    x, (a, b), layer = torch.randn(M, K), factors(), linear(K, N)
    with pytest.raises(TypeError, match="layer must be a function or a module, got Tensor"):
        functional.lora_beside(x, torch.randn(N, K), a, b, scale=1.0)
    with pytest.raises(ValueError, match=r"the output of layer must have shape \(6, 8\), got"):
        functional.lora_beside(x, linear(K, N + 1), a, b, scale=1.0)
    with pytest.raises(TypeError, match="the output of layer must be a tensor, got tuple"):
        functional.lora_beside(x, lambda x: (x, x), a, b, scale=1.0)
    with pytest.raises(TypeError, match=r"lora_b must be torch\.float32 or wider"):
        functional.lora_beside(x, layer, a, b.bfloat16(), scale=1.0)
    with pytest.raises(TypeError, match="in_layer must be a function or a module, got NoneType"):
        functional.ffn_adapter_beside(x, None, layer, *bottleneck())
    gate = dict(gate_layer=linear(K, F + 1))
    with pytest.raises(ValueError, match="gate_layer must return a tensor like in_layer's"):
        functional.ffn_adapter_beside(x, linear(K, F), linear(F, N), *bottleneck(), **gate)
    with pytest.raises(ValueError, match=r"the output of in_layer must have shape \(6, F\), got"):
        functional.ffn_adapter_beside(x, lambda x: x.sum(0), layer, *bottleneck())
    with pytest.raises(ValueError, match="ffn_activation must be one of"):
        functional.ffn_adapter_beside(x, layer, layer, *bottleneck(), ffn_activation="swish")
