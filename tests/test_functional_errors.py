"""Bad input to the public functions: one clear error that names the argument."""

import pytest
import torch

from pelt_fast import functional

K, N, R = 6, 5, 2


def lora(**changes):
    arguments = dict(x=torch.randn(3, K), weight=torch.randn(N, K), bias=torch.randn(N),
                     lora_a=torch.randn(R, K), lora_b=torch.randn(N, R), scale=1.0)  # fmt: skip
    return functional.lora_linear(**(arguments | changes))


def adapter(**changes):
    arguments = dict(base_out=torch.randn(3, N), x=torch.randn(3, K), down_weight=torch.randn(R, K),
                     down_bias=torch.randn(R), up_weight=torch.randn(N, R), up_bias=torch.randn(N))  # fmt: skip
    return functional.parallel_adapter(**(arguments | changes))


def ffn(**changes):
    arguments = dict(x=torch.randn(3, K), in_weight=torch.randn(7, K), in_bias=None,
                     out_weight=torch.randn(N, 7), out_bias=None, down_weight=torch.randn(R, K),
                     down_bias=None, up_weight=torch.randn(N, R), up_bias=None)  # fmt: skip
    return functional.ffn_parallel_adapter(**(arguments | changes))


def prefix(**changes):
    arguments = dict(q=torch.randn(2, 4, 3, 8), k=torch.randn(2, 2, 5, 8), v=torch.randn(2, 2, 5, 8),
                     prefix_k=torch.randn(2, 3, 8), prefix_v=torch.randn(2, 3, 8))  # fmt: skip
    return functional.prefix_attention(**(arguments | changes))


BAD = [
    (lora, dict(weight=torch.randn(N, K + 1)), ValueError, r"weight must have shape \(N, 6\)"),
    (lora, dict(bias=torch.randn(N + 1)), ValueError, r"bias must have shape \(5\)"),
    (lora, dict(lora_a=torch.randn(R, K + 1)), ValueError, r"lora_a must have shape \(R, 6\)"),
    (lora, dict(lora_b=torch.randn(N, R + 1)), ValueError, r"lora_b must have shape \(5, 2\)"),
    (lora, dict(weight=torch.randn(N, K).half()), TypeError, "weight must be torch.float32 like x"),
    (lora, dict(x=torch.ones(3, K, dtype=torch.long)), TypeError, "x must be one of float64"),
    (lora, dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    (lora, dict(lora_a=None), TypeError, "lora_a must be a tensor, got NoneType"),
    (ffn, dict(up_weight=[0.0]), TypeError, "up_weight must be a tensor, got list"),
    (prefix, dict(prefix_k=None), TypeError, "prefix_k must be a tensor, got NoneType"),
    (lora, dict(lora_a=torch.randn(R, K).half()), TypeError, "lora_a must be torch.float32 or wider"),
    (lora, dict(lora_a=torch.randn(R, K, device="meta")), ValueError, "lora_a must be on cpu"),
    (lora, dict(scale=float("nan")), ValueError, "scale must be a finite number"),
    (lora, dict(scale=float("inf")), ValueError, "scale must be a finite number"),
    (lora, dict(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\)"),
    (lora, dict(dropout_p=-0.1), ValueError, r"dropout_p must be in \[0, 1\)"),
    (adapter, dict(base_out=torch.randn(4, N)), ValueError, "base_out must have shape"),
    (adapter, dict(activation="swish"), ValueError, "activation must be one of"),
    (adapter, dict(layer_norm="both"), ValueError, "layer_norm must be one of"),
    (adapter, dict(layer_norm="in"), ValueError, "norm_weight is needed"),
    (adapter, dict(scale=torch.ones(3)), ValueError, "scale must be a number or of shape"),
    (adapter, dict(up_bias=torch.randn(N + 1)), ValueError, "up_bias must have shape"),
    (ffn, dict(out_weight=torch.randn(N, 8)), ValueError, "out_weight must have shape"),
    (ffn, dict(in_weight=torch.randn(7, K, requires_grad=True)), ValueError,
     "in_weight requires a gradient"),
    (ffn, dict(ffn_activation="celu"), ValueError, "ffn_activation must be one of"),
    (ffn, dict(packed=torch.randn(8, K)), ValueError, "packed must have at least 9 rows"),
    (ffn, dict(packed_out=torch.randn(N, 8)), ValueError, "packed_out must have at least 9 columns"),
    (ffn, dict(packed_out=torch.randn(N + 1, 9)), ValueError, "packed_out"),
    (ffn, dict(adapter_x=torch.randn(2, K)), ValueError, rf"adapter_x must have shape \(3, {K}\)"),
    (ffn, dict(adapter_x=torch.randn(3, K).double()), TypeError, "adapter_x must be torch.float32"),
    (ffn, dict(adapter_x=torch.randn(3, K), packed=torch.randn(9, K)), ValueError, "one input"),
    (ffn, dict(output_dropout_p=2.0), ValueError, "output_dropout_p must be in"),
    (prefix, dict(k=torch.randn(2, 2, 5, 9)), ValueError, "k must have shape"),
    (prefix, dict(k=torch.randn(2, 3, 5, 8), v=torch.randn(2, 3, 5, 8),
                  prefix_k=torch.randn(3, 3, 8), prefix_v=torch.randn(3, 3, 8)),
     ValueError, "does not divide"),
    (prefix, dict(prefix_v=torch.randn(2, 4, 8)), ValueError, "prefix_v must have shape"),
    (prefix, dict(prefix_k=torch.randn(2, 0, 8), prefix_v=torch.randn(2, 0, 8)), ValueError,
     "at least one key"),
    (prefix, dict(attn_mask=torch.ones(3, 8, dtype=torch.bool)), ValueError, "attn_mask must be"),
    (prefix, dict(attn_mask=torch.ones(3, 5, dtype=torch.long)), TypeError, "bool or floating"),
    (prefix, dict(attn_mask=torch.zeros(3, 5, requires_grad=True)), ValueError, "gradient"),
    (prefix, dict(form="relu"), ValueError, "has no gate"),
    (prefix, dict(composition="sum"), ValueError, "composition must be one of"),
    (prefix, dict(q=torch.randn(4, 3, 8)), ValueError, "q must have at least 4 dims"),
]  # fmt: skip


IDS = [
    f"{function.__name__} {' '.join(changes)} {message}" for function, changes, _, message in BAD
]


@pytest.mark.parametrize("function, changes, error, message", BAD, ids=IDS)
def test_bad_input_is_named(function, changes, error, message):
    with pytest.raises(error, match=message):
        function(**changes)


@pytest.mark.parametrize("function", [lora, adapter, ffn, prefix])
def test_good_input_is_taken(function):
    assert torch.isfinite(function()).all()
