"""What is kept for backward, and what is allocated on the way: the point of the library."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import saved_bytes
from pelt_fast import functional

M, K, N, R, F = 640, 96, 80, 4, 300
FLOAT = 4
SEED = 16  # bytes of one (key, offset)


def parameter(*shape, trainable=True):
    return torch.nn.Parameter(torch.randn(*shape), requires_grad=trainable)


def lora_parts(a=True, b=True, x=True):
    return (torch.randn(M, K, requires_grad=x), parameter(N, K, trainable=False),
            parameter(N, trainable=False), parameter(R, K, trainable=a), parameter(N, R, trainable=b))  # fmt: skip


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    "a, b, expected", [(True, True, K + R), (True, False, K), (False, True, R), (False, False, 0)]
)
def test_lora_saves_x_for_a_and_s_for_b_and_nothing_else(p, a, b, expected):
    x, *parameters = lora_parts(a, b)
    kept = saved_bytes(
        lambda: functional.lora_linear(x, *parameters, scale=1.0, dropout_p=p), parameters
    )
    assert kept == M * expected * FLOAT + (SEED if p else 0)


def test_lora_on_a_bf16_base_saves_no_wider_copy():
    x, *parameters = lora_parts()
    x, frozen = (
        x.detach().bfloat16().requires_grad_(),
        [p.detach().bfloat16() for p in parameters[:2]],
    )
    every = [*frozen, *parameters[2:]]
    kept = saved_bytes(lambda: functional.lora_linear(x, *every, scale=1.0, dropout_p=0.1), every)
    assert kept == M * (K + R) * 2 + SEED


def bottleneck(inputs, outputs):
    return [parameter(R, inputs), parameter(R), parameter(outputs, R), parameter(outputs)]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("layer_norm", ["none", "in", "out"])
@pytest.mark.parametrize("learned", [None, 1, N])
def test_adapter_saves_x_and_t_also_with_a_learned_scale(p, layer_norm, learned):
    x, base = torch.randn(M, K, requires_grad=True), torch.randn(M, N, requires_grad=True)
    parameters = bottleneck(K, N)
    norm = [parameter(K if layer_norm == "in" else N) for _ in range(2)]
    scale = 2.0 if learned is None else torch.nn.Parameter(torch.ones(learned))
    known = [*parameters, *norm] + ([] if learned is None else [scale])
    kept = saved_bytes(
        lambda: functional.parallel_adapter(
            base, x, *parameters, scale=scale, layer_norm=layer_norm, norm_weight=norm[0],
            norm_bias=norm[1], dropout_p=p,
        ), known,
    )  # fmt: skip
    # a learned scale keeps the folded small matrices, not an M x N tensor
    small = 0 if learned is None else (N * R + N) * FLOAT
    assert M * (K + R) * FLOAT <= kept <= M * (K + R) * FLOAT + SEED + small


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("separate", [True, False])
def test_widened_ffn_saves_what_the_adapter_read_and_the_pre_activations(
    p, gated, need_x, separate
):
    x = torch.randn(M, K, requires_grad=need_x)
    own = torch.randn(M, K, requires_grad=True) if separate else None
    frozen = [parameter(*s, trainable=False) for s in ((F, K), (F,), (N, F), (N,))]
    gate = parameter(F, K, trainable=False) if gated else None
    parameters = bottleneck(K, N)
    known = [*frozen, *parameters] + ([gate] if gated else [])
    kept = saved_bytes(
        lambda: functional.ffn_parallel_adapter(
            x, *frozen, *parameters, adapter_x=own, gate_weight=gate, scale=2.0, dropout_p=p,
            activation_dropout_p=p, output_dropout_p=p,
        ), known,
    )  # fmt: skip
    inner = (2 * F if gated else F) if need_x else 0
    assert kept == M * (K + inner + R) * FLOAT + (3 * SEED if p else 0)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_prefix_attention_saves_what_attention_saves(p):
    b, h, g, t, s, d, length = 3, 4, 2, 24, 20, 8, 5
    q = torch.randn(b, h, t, d, requires_grad=True)
    k, v = (torch.randn(b, g, s, d, requires_grad=True) for _ in range(2))
    prefix = [parameter(g, length, d) for _ in range(2)]
    kept = saved_bytes(lambda: functional.prefix_attention(q, k, v, *prefix, dropout_p=p), prefix)
    own = 2 * b * h * t * d + 2 * b * g * s * d + b * h * t
    assert kept == own * FLOAT + (3 * SEED if p else 0)  # the seeds, the context's dropout state


class Allocations(TorchDispatchMode):
    """Elements of every tensor made, views left out."""

    def __init__(self):
        super().__init__()
        self.sizes: list[tuple[int, torch.dtype]] = []
        self.alive: list[torch.Tensor] = []  # so that no storage address is used twice

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        known = {
            t.untyped_storage().data_ptr()
            for t in (*arguments, *self.alive) if isinstance(t, torch.Tensor)
        }  # fmt: skip
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.alive.append(tensor)
                if tensor.untyped_storage().data_ptr() not in known:
                    self.sizes.append((tensor.numel(), tensor.dtype))
        return result


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_plan_allocates_one_big_tensor_each_way(p, dtype):
    """y forward, dx backward: no temporary of size M x N or M x K, no cast of x or dy."""
    from pelt_fast.ops.common.dropout import draw_seed
    from tests.flat import cpu as low_rank

    m, k, n = 16384, 512, 512  # eight row blocks
    x, dy = torch.randn(m, k, dtype=dtype), torch.randn(m, n, dtype=dtype)
    weight, a, b = torch.randn(n, k, dtype=dtype), torch.randn(R, k), torch.randn(n, R)
    seed = draw_seed(x.device)[0] if p else None
    with Allocations() as forward:
        _, s = low_rank.lora_forward(x, weight, None, a, b, 2.0, p, seed)
    with Allocations() as backward:
        low_rank.lora_backward(dy, x, s, weight, a, b, 2.0, p, seed, [True] * 3)
    for made in (forward, backward):
        big = [size for size, kind in made.sizes if size >= m * k // 2 and kind.is_floating_point]
        assert big == [m * k]


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_packed_ffn_plan_allocates_what_the_frozen_block_needs(p):
    """Forward: pre-activations, their activation, y. The frozen block makes the same, and with
    dropout a mask and a copy of each more."""
    from pelt_fast.ops.common.dropout import draw_seed
    from tests.flat import cpu as ffn

    m, k, inner, rank = 16384, 512, 1024, 16
    x, packed = torch.randn(m, k), torch.randn(inner + rank, k)
    out_weight, up = torch.randn(k, inner), torch.randn(k, rank)
    bias = [torch.randn(n) for n in (inner, k, rank, k)]
    seed = draw_seed(x.device, 3) if p else None
    settings = ("gelu", "relu", 4.0, p, p, p, seed)
    with Allocations() as forward:
        _, pre = ffn.ffn_forward(
            x, None, packed[:inner], bias[0], None, None, out_weight, bias[1], packed[inner:], bias[2],
            up, bias[3], packed, None, *settings, True,
        )  # fmt: skip
    big = sorted(n for n, kind in forward.sizes if n >= m * k // 2 and kind.is_floating_point)
    assert big == sorted([m * (inner + rank)] * 2 + [m * k])
    with Allocations() as inference:  # A and H are made over the pre-activations
        ffn.ffn_forward(
            x, None, packed[:inner], bias[0], None, None, out_weight, bias[1], packed[inner:], bias[2],
            up, bias[3], packed, torch.cat([out_weight, 4.0 * up], 1), "gelu", "relu", 4.0, p, p,
            0.0, seed, False,
        )  # fmt: skip
    big = sorted(n for n, kind in inference.sizes if n >= m * k // 2 and kind.is_floating_point)
    assert big == sorted([m * (inner + rank), m * k])
    gate = torch.randn(inner, k)
    for keep_pre in (True, False):
        with Allocations() as gated:  # φ(G) has no place of its own
            ffn.ffn_forward(
                x, None, packed[:inner], bias[0], gate, None, out_weight, bias[1], packed[inner:],
                bias[2], up, bias[3], torch.cat([gate, packed]), None, "silu", "relu", 4.0, p, p, p,
                seed, keep_pre,
            )  # fmt: skip
        big = sorted(n for n, kind in gated.sizes if n >= m * k // 2 and kind.is_floating_point)
        kept = [m * (inner + rank)] if keep_pre else []
        assert big == sorted([m * (2 * inner + rank), m * k, *kept])
    with Allocations() as backward:
        ffn.ffn_backward(
            torch.randn(m, k), x, pre, packed[:inner], None, out_weight, packed[inner:], up, packed,
            None, *settings, False, [True] * 5 + [False],
        )  # fmt: skip
    big = sorted(n for n, kind in backward.sizes if n >= m * k // 2 and kind.is_floating_point)
    # the output gradient handed in, dropped dy where there is dropout, [dZ | dT], dx
    assert big == sorted([m * k] * (3 if p else 2) + [m * (inner + rank)])
