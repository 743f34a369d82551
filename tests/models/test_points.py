"""Points of the grid beside the presets, and modifications that stand together."""

import copy

import pytest
import torch

import pelt_fast
from tests.models.test_parity import assert_fused_equals_reference, small_method
from tests.small import MODELS, inputs, randomise


def point(*arguments, **fields):
    return pelt_fast.PeltConfig("point", (pelt_fast.Modification(*arguments, **fields),))


BESIDE_THE_PRESETS = {
    "prefix added": point("prefix", "heads", composition="add", size=3),
    "prefix without MLP": point(
        "prefix", "heads", composition="gated", size=3, reparameterization="none"
    ),
    "learned scale": point("bottleneck", "ffn", "parallel", "learned_scale", 3, 2.0, "tanh"),
    "learned channel scale": point(
        "bottleneck", "ffn", "parallel", "learned_channel_scale", 3, activation="tanh"
    ),
    "sequential, scaled, norm out": point(
        "bottleneck", "ffn", "sequential", "scaled", 3, 2.0, "gelu", layer_norm="out", dropout=0.1
    ),
    "parallel, norm in": point(
        "bottleneck", "ffn", "parallel", size=3, layer_norm="in", activation="silu"
    ),
    "attention, learned scale": point(
        "bottleneck", "attention", "sequential", "learned_scale", 3, activation="gelu"
    ),
    "LoRA on k and o": pelt_fast.PeltConfig(
        "ko",
        tuple(pelt_fast.Modification("low_rank", f"attention.{t}", size=3) for t in "ko"),
    ),
    "a prompt before MAM and LoRA": pelt_fast.PeltConfig(
        "all",
        (
            pelt_fast.Modification("prompt", "embeddings", composition="gated", size=3),
            pelt_fast.Modification("prefix", "heads", composition="gated", size=3),
            pelt_fast.Modification("low_rank", "attention.q", size=3),
            pelt_fast.Modification("bottleneck", "ffn", size=3, activation="tanh"),
        ),
    ),
    "adapters by head beside a prefix": pelt_fast.PeltConfig(
        "heads",
        (
            pelt_fast.Modification("prefix", "heads", composition="gated", size=3),
            pelt_fast.Modification("bottleneck", "heads", size=3),
        ),
    ),
    "adapters by head of the query": point("bottleneck", "heads", size=3, reads="query"),
    "parallel on attention after its output": point(
        "bottleneck", "attention", size=3, activation="silu", placement="after_output"
    ),
    "before the dropout": point(
        "bottleneck", "ffn", size=3, activation="tanh", placement="before_dropout"
    ),
    "of the residual stream": point(
        "bottleneck", "ffn", size=3, activation="tanh", reads="residual"
    ),
    "LoRA under an adapter": pelt_fast.PeltConfig(
        "both",
        (
            pelt_fast.Modification(
                "bottleneck", "attention", "sequential", size=3, activation="silu"
            ),
            pelt_fast.Modification("low_rank", "attention.o", size=3),
        ),
    ),
}


@pytest.mark.parametrize("architecture", [a for a in MODELS if a != "llama"])
def test_bitfit_stands_beside_lora_and_adapters(architecture):
    """A bias trains under the LoRA of its own layer; a block that trains is not taken over."""
    names = ("bitfit", "lora", "scaled_parallel_adapter")
    parts = [m for name in names for m in small_method(name, dropout=0.0).modifications]
    config = pelt_fast.PeltConfig("all", tuple(parts))
    model = randomise(pelt_fast.inject(MODELS[architecture](), config)).train()
    batch = inputs(model, padding="right")
    _, grads = assert_fused_equals_reference(model, batch)
    assert any(n.endswith("query.bias") or n.endswith("q_proj.bias") for n in grads)


@pytest.mark.parametrize("name", BESIDE_THE_PRESETS)
@pytest.mark.parametrize("architecture", MODELS)
def test_points_beside_the_presets_run_fused_as_in_the_reference(architecture, name, tmp_path):
    base = MODELS[architecture]()
    model = randomise(pelt_fast.inject(copy.deepcopy(base), BESIDE_THE_PRESETS[name])).train()
    batch = inputs(model, padding="left")
    _, grads = assert_fused_equals_reference(model, batch)
    assert all(grads[n].abs().sum() > 0 for n, p in model.named_parameters() if p.requires_grad)
    pelt_fast.save(model, tmp_path)
    twin = pelt_fast.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(twin.eval()(**batch).logits, model.eval()(**batch).logits)
    before = base.state_dict()
    after = pelt_fast.eject(twin).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
