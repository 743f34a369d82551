"""Where each adapter reads and adds, against hooks on an untouched twin."""

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

import pelt_fast
from pelt_fast import Modification, PeltConfig
from pelt_fast.layouts.lookup import base_of, find, stacks_of
from tests.models.judge import assert_near, exactly
from tests.models.test_parity import PADDINGS, outputs_and_gradients
from tests.small import MODELS, inputs, randomise


def bottleneck(target, insertion="parallel", composition="add", size=5, **details):
    return Modification("bottleneck", target, insertion, composition, size, **details)


def delta(site, x):
    """The update of a site, in plain PyTorch."""
    if site.layer_norm == "in":
        x = F.layer_norm(x, x.shape[-1:], site.norm_weight, site.norm_bias)
    h = F.relu(F.linear(x, site.down_weight, site.down_bias))
    return site.scale * F.linear(h, site.up_weight, site.up_bias)


def by_head(site, x):
    """Each head's bottleneck on its own slice, one after the other."""
    parts = x.split(site.down_weight.shape[-1], -1)
    updates = [F.relu(p @ d.t()) @ u for p, d, u in zip(parts, site.down_weight, site.up_weight)]
    return site.scale * torch.cat(updates, -1)


def first(args, kwargs):
    return args[0] if args else kwargs["hidden_states"]


def caught(module, kept, name, output=False):
    if output:
        module.register_forward_hook(lambda m, a, out: kept.update({name: out}))
    else:
        hook = lambda m, args, kwargs: kept.update({name: first(args, kwargs)})  # noqa: E731
        module.register_forward_pre_hook(hook, with_kwargs=True)


def twins(architecture, modification):
    """An injected model, the twin without, and pairs of (stack, layer, plain layer)."""
    plain = MODELS[architecture](dropout=0.0)
    config = PeltConfig("point", (modification,), train_head=False)
    model = randomise(pelt_fast.inject(copy.deepcopy(plain), config)).train()
    plain.requires_grad_(False)
    layers = [
        (stack, *pair)
        for stack in stacks_of(plain)
        for pair in zip(*(find(base_of(m), stack.layers) for m in (model, plain)), strict=True)
    ]
    return model, plain, layers


def assert_twins(model, plain, padding=None):
    batch = inputs(model, padding=padding)
    logits, grads = outputs_and_gradients(model, batch)
    model.zero_grad()
    out = plain.train()(**batch)
    assert_near(logits, out.logits, exactly(model, batch)["logits"])
    out.loss.backward()  # through the hooks, to the same parameters
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = grads[name].abs().max() + 1e-3
            assert (parameter.grad - grads[name]).abs().max() <= 2e-4 * size, name


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("placement", ["before_output", "after_output"])
@pytest.mark.parametrize("architecture", MODELS)
def test_parallel_attention_adapter(architecture, placement, padding):
    model, plain, layers = twins(
        architecture, bottleneck("attention", placement=placement, layer_norm="in")
    )
    for stack, layer, other in layers:
        for slot in stack.attentions:
            site, kept, out = find(layer, slot.out).pelt_adapter, {}, find(other, slot.out)
            caught(find(other, slot.module), kept, "x")
            if placement == "before_output":
                out.register_forward_pre_hook(
                    lambda m, a, site=site, kept=kept: (a[0] + delta(site, kept["x"]),)
                )
            else:
                out.register_forward_hook(
                    lambda m, a, y, site=site, kept=kept: y + delta(site, kept["x"])
                )
    assert_twins(model, plain, padding)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("reads", ["input", "query"])
@pytest.mark.parametrize("architecture", MODELS)
def test_multi_head_adapter(architecture, reads, padding):
    if (architecture, reads) == ("llama", "query"):
        pytest.skip("rotated queries: see the test of the op's place below")
    modification = bottleneck("heads", composition="scaled", scale=1.5, reads=reads)
    model, plain, layers = twins(architecture, modification)
    for stack, layer, other in layers:
        for slot in stack.attentions:
            kept, owner = {}, slot.out if reads == "input" else slot.module
            site = find(layer, owner).pelt_heads
            if reads == "input":
                caught(find(other, slot.module), kept, "x")
            else:
                caught(find(other, slot.q), kept, "x", output=True)
            find(other, slot.out).register_forward_pre_hook(
                lambda m, a, site=site, kept=kept: (a[0] + by_head(site, kept["x"]),)
            )
    assert_twins(model, plain, padding)


def test_multi_head_adapter_on_rotated_grouped_queries():
    """Llama: two query heads share a bottleneck, and read the query after its rotation."""
    from transformers.models.llama import modeling_llama

    model, plain, layers = twins("llama", bottleneck("heads", reads="query"))
    kept = []

    def spy(module, query, key, value, mask, **kwargs):
        out, weights = modeling_llama.ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, mask, **kwargs
        )
        site = sites[id(module)]
        down, up = (w.repeat_interleave(2, 0) for w in (site.down_weight, site.up_weight))
        update = F.relu(query @ down.transpose(-1, -2)) @ up
        kept.append(query)
        return out + update.transpose(1, 2), weights

    sites = {id(other.self_attn): layer.self_attn.pelt_heads for _, layer, other in layers}
    modeling_llama.ALL_ATTENTION_FUNCTIONS.register("pelt_fast_spy", spy)
    plain.config._attn_implementation = "pelt_fast_spy"
    assert_twins(model, plain)
    assert len(kept) == 2 and model.model.layers[0].self_attn.pelt_heads.down_weight.shape[0] == 2


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("architecture", MODELS)
def test_adapter_after_the_norm_reads_and_adds_at_the_layers_output(architecture, padding):
    modification = bottleneck("ffn", "sequential", placement="after_norm")
    model, plain, layers = twins(architecture, modification)
    for _, layer, other in layers:
        other.register_forward_hook(lambda m, a, y, site=layer.pelt_ffn_adapter: y + delta(site, y))
    assert_twins(model, plain, padding)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layer_norm", ["none", "in"])
@pytest.mark.parametrize("architecture", MODELS)
def test_pfeiffer_reads_the_norm_and_adds_in_front_of_it(architecture, layer_norm, padding):
    modification = bottleneck(
        "ffn", "sequential", "scaled", scale=1.5, placement="around_norm", layer_norm=layer_norm
    )
    model, plain, layers = twins(architecture, modification)
    for stack, layer, other in layers:
        site, path = layer.pelt_ffn_adapter, stack.ffn.norm_after
        if path is None:  # pre-norm: nothing normalises the sum
            other.register_forward_hook(lambda m, a, y, site=site: y + delta(site, y))
            continue

        def again(norm, args, y, site=site):
            return F.layer_norm(
                args[0] + delta(site, y), y.shape[-1:], norm.weight, norm.bias, norm.eps
            )

        find(other, path).register_forward_hook(again)
    assert_twins(model, plain, padding)


def test_pfeiffer_asks_where_the_norm_is():
    model = MODELS["roberta"]()
    (stack,) = stacks_of(model)
    ffn = dataclasses.replace(stack.ffn, norm_after=None)
    layout = pelt_fast.Layout("roberta", (dataclasses.replace(stack, ffn=ffn),))
    around = PeltConfig("p", (bottleneck("ffn", "sequential", placement="around_norm"),))
    with pytest.raises(ValueError, match=r"needs its FFNLayout to name norm .* or norm_after"):
        pelt_fast.inject(model, around, layout=layout)
    assert not any("pelt_" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("target", ["ffn", "attention"])
@pytest.mark.parametrize("architecture", MODELS)
def test_sequential_adapter_without_its_residual(architecture, target):
    model, plain, layers = twins(architecture, bottleneck(target, "sequential", residual=False))
    for stack, layer, other in layers:
        if target == "ffn":
            name = "mlp" if stack.ffn.is_container else stack.ffn.out_proj
            find(other, name).register_forward_hook(
                lambda m, a, y, site=layer.pelt_ffn_adapter: delta(site, y)
            )
            continue
        for slot in stack.attentions:
            site = find(layer, slot.out).pelt_adapter
            find(other, slot.out).register_forward_hook(lambda m, a, y, site=site: delta(site, y))
    assert_twins(model, plain)


@pytest.mark.parametrize("reads", ["default", "input", "residual"])
@pytest.mark.parametrize("placement", ["default", "before_dropout"])
@pytest.mark.parametrize("architecture", ["mbart", "llama", "bart"])
def test_parallel_ffn_adapter_reads_the_block_or_the_stream(architecture, reads, placement):
    model, plain, layers = twins(architecture, bottleneck("ffn", reads=reads, placement=placement))
    for stack, layer, other in layers:
        slot, kept = stack.ffn, {}
        residual = slot.norm and (reads if reads != "default" else slot.adapter_reads) == "residual"
        caught(find(other, slot.norm if residual else slot.entry), kept, "x")
        name = "mlp" if slot.is_container else slot.out_proj
        find(other, name).register_forward_hook(
            lambda m, a, y, site=layer.pelt_ffn_adapter, kept=kept: y + delta(site, kept["x"])
        )
    assert_twins(model, plain)


@pytest.mark.parametrize("reads", ["input", "residual"])
def test_before_the_dropout_the_update_is_dropped_with_the_output(reads):
    """Half of what the block adds is 0, update and all; after the dropout (default) none is."""
    for placement, dropped in (("before_dropout", True), ("after_dropout", False)):
        model = MODELS["mbart"](dropout=0.5)
        modification = bottleneck("ffn", reads=reads, placement=placement)
        pelt_fast.inject(model, PeltConfig("point", (modification,)))
        randomise(model).train()
        layer, seen = model.model.encoder.layers[0], {}
        layer.final_layer_norm.register_forward_pre_hook(lambda m, a, s=seen: s.update(x=a[0]))
        layer.register_forward_hook(lambda m, a, y, s=seen: s.update(y=y))
        model(**inputs(model, batch=16, length=20))
        share = (seen["x"] == seen["y"]).double().mean().item()
        assert abs(share - 0.5 * dropped) < 0.03, (placement, share)


@pytest.mark.parametrize("architecture", [a for a in MODELS if a != "llama"])
def test_bitfit_is_full_fine_tuning_of_the_biases_alone(architecture):
    plain = MODELS[architecture](dropout=0.0).train()
    model = pelt_fast.inject(copy.deepcopy(plain), "bitfit").train()
    batch = inputs(model, padding="right")
    plain(**batch).loss.backward()
    model(**batch).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    head = {n for n in trained if n.startswith("classifier")}
    assert trained.keys() - head and all(n.endswith("bias") for n in trained.keys() - head)
    for name, parameter in plain.named_parameters():
        if name in trained:
            assert torch.equal(trained[name].grad, parameter.grad), name
        elif name.endswith(".bias"):
            raise AssertionError(f"{name} does not train")


def test_bitfit_of_the_encoder_alone():
    modification = Modification("bias", "model", where=("encoder",))
    model = pelt_fast.inject(MODELS["bart"](), PeltConfig("encoder biases", (modification,)))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(n.startswith("model.encoder.") for n in trained)


def test_what_a_model_does_not_have_is_refused_before_anything_changes():
    model = MODELS["llama"]()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="LlamaForCausalLM has no biases in"):
        pelt_fast.inject(model, "bitfit")
    with pytest.raises(ValueError, match="a slice of the input, which is 32 wide; 4 heads of 16"):
        pelt_fast.inject(MODELS["llama"](head_dim=16), PeltConfig("x", (bottleneck("heads"),)))
    prompt = Modification("prompt", "embeddings", composition="gated", size=2, where=("encoder",))
    with pytest.raises(ValueError, match="has no embeddings in encoder"):
        pelt_fast.inject(model, PeltConfig("x", (prompt,)))
    assert before == {n: p.requires_grad for n, p in model.named_parameters()}
    both = (bottleneck("heads", reads="query"), pelt_fast.methods()["prefix"].modifications[0])
    with pytest.raises(ValueError, match="one attention carries one of them"):
        PeltConfig("x", both)
