"""A row of the user's proves itself before inject returns: a zero update is the base."""

import dataclasses
import random

import numpy
import pytest
import torch
from torch import nn
from transformers import (
    BitNetConfig,
    BitNetForCausalLM,
    DistilBertConfig,
    DistilBertModel,
    FalconH1Config,
    FalconH1ForCausalLM,
)

import pelt_fast
from pelt_fast import AttentionLayout, FFNLayout, Layout, StackLayout
from pelt_fast.layouts.lookup import base_of, find, missing_paths, stacks_of
from pelt_fast.layouts.table import ROWS, rows_of
from pelt_fast.layouts.unnamed import unnamed_in_block, unnamed_in_layer
from tests.models.test_slots import BIOGPT, biogpt
from tests.small import MODELS, MORE, bert, llama

PRESETS = [n for n, config in pelt_fast.methods().items() if not config.is_full]
LLAMA = next(row for row in ROWS if row.model_type == "llama")
BERT = next(row for row in ROWS if row.model_type == "bert")


def fitting(model) -> Layout:
    """The table row of a model, as if it were the user's."""
    base = base_of(model)
    for row in rows_of(model):
        if all(not list(missing_paths(base, stack)) for stack in row.stacks):
            return row
    raise AssertionError("no row fits")


def changed(row: Layout, **changes) -> Layout:
    """A row whose feed-forward layout is another."""
    stacks = tuple(
        dataclasses.replace(stack, ffn=dataclasses.replace(stack.ffn, **changes))
        for stack in row.stacks
    )
    return Layout(row.model_type, stacks)


@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("name", [*MODELS, *MORE])
def test_every_row_of_the_table_proves_itself(name, method, caplog):
    make = {**MODELS, **MORE}[name]
    torch.manual_seed(0)
    model = make()
    try:
        pelt_fast.inject(model, method, layout=fitting(model))
    except ValueError as error:
        assert "the layout does not describe" not in str(error)
        pytest.skip("the method has no place there")
    assert "self-test" not in caplog.text


@pytest.mark.parametrize("name", [*MODELS, *MORE])
def test_the_rows_of_the_table_name_all_that_their_blocks_hold(name):
    model = {**MODELS, **MORE}[name]()
    base = base_of(model)
    for stack in fitting(model).stacks:
        for layer in find(base, stack.layers) if stack.ffn else ():
            assert unnamed_in_block(layer, stack.ffn) == []


@pytest.mark.parametrize("method", ["scaled_parallel_adapter", "houlsby", "mam"])
@pytest.mark.parametrize(
    "changes",
    [dict(activation_dropout=None), dict(output_dropout_also=()),
     dict(output_dropout="activation_dropout"), dict(activation_dropout="dropout")],
    ids=str,
)  # fmt: skip
def test_a_dropout_that_is_lost_or_moved_is_refused(changes, method):
    torch.manual_seed(0)
    model = biogpt()
    model.biogpt.config.hidden_dropout_prob = 0.1
    for layer in model.biogpt.layers:
        layer.dropout, layer.activation_dropout = 0.1, 0.2
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"layers.0 is off by .* in training mode"):
        pelt_fast.inject(model, method, layout=changed(BIOGPT, **changes))
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert "_pelt" not in vars(model) and "pelt" not in str(model)
    pelt_fast.inject(model, method, layout=BIOGPT)


def test_a_dropout_that_the_layer_still_does_is_no_fault():
    pelt_fast.inject(biogpt(), "houlsby", layout=changed(BIOGPT, output_dropout=None))


def test_gate_and_up_in_the_wrong_order_are_refused():
    model = llama()
    swapped = changed(LLAMA, in_proj="mlp.gate_proj", gate_proj="mlp.up_proj")
    with pytest.raises(ValueError, match=r"layers.0 is off by .* of its output in evaluation mode"):
        pelt_fast.inject(model, "scaled_parallel_adapter", layout=swapped)


@pytest.mark.parametrize("width", [32, 48])  # the norm's width is the layer's too, or is not
def test_a_norm_between_that_no_slot_names_is_refused(width):
    model = bert(intermediate_size=width)
    for layer in model.bert.encoder.layer:
        act = layer.intermediate.intermediate_act_fn
        layer.intermediate.intermediate_act_fn = nn.Sequential(act, nn.LayerNorm(width))
    layout = changed(BERT, activation="intermediate.intermediate_act_fn.0")
    why = "no layout names|with it fails|forward is not known"
    with pytest.raises(ValueError, match=why):
        pelt_fast.inject(model, "scaled_parallel_adapter", layout=layout)
    assert "pelt" not in str(model)


def test_the_message_says_what_no_slot_names():
    model, lost = biogpt(), changed(BIOGPT, activation_dropout=None)
    model.biogpt.layers[0].activation_dropout = 0.3
    with pytest.raises(
        ValueError, match=r"no layout names: .*activation_dropout.*Name what belongs"
    ):
        pelt_fast.inject(model, "scaled_parallel_adapter", layout=lost)


def test_the_norm_behind_a_block_is_named():
    model = bert()
    (stack,) = stacks_of(model)
    layer = find(base_of(model), stack.layers)[0]
    unnamed = unnamed_in_layer(layer, stack)
    assert stack.ffn.norm_after == "output.LayerNorm" and "output.LayerNorm" not in unnamed
    assert "attention.output.LayerNorm" in unnamed


def test_a_norm_that_does_not_stand_in_front_of_the_block_is_refused():
    wrong = changed(LLAMA, norm="input_layernorm")
    config = pelt_fast.methods()["scaled_parallel_adapter"].replace(reads="residual")
    with pytest.raises(ValueError, match=r"layers.0.mlp does not read what input_layernorm gives"):
        pelt_fast.inject(llama(), config, layout=wrong)
    with pytest.raises(ValueError, match=r"layers.0.mlp does not read what input_layernorm gives"):
        methods = {"a": "lora", "b": config}
        pelt_fast.inject_named(llama(), methods, together=True, layout=wrong)
    pelt_fast.inject(llama(), config, layout=LLAMA)


def sub_normed():
    torch.manual_seed(0)
    config = BitNetConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)  # fmt: skip
    return BitNetForCausalLM(config)


def factored():
    torch.manual_seed(0)
    config = FalconH1Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4,
        mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mlp_multipliers=[0.5, 0.25],
    )  # fmt: skip
    return FalconH1ForCausalLM(config)


def row(kind: str, mlp: str = "mlp", norm: str | None = None) -> Layout:
    names = (f"self_attn.{x}_proj" for x in "qkvo")
    ffn = FFNLayout(mlp, f"{mlp}.up_proj", f"{mlp}.down_proj", f"{mlp}.act_fn", "hidden_act",
                  gate_proj=f"{mlp}.gate_proj", norm=norm)  # fmt: skip
    own = (AttentionLayout("decoder", "self_attn", *names),)
    return Layout(kind, (StackLayout("decoder", "", "layers", own, ffn),))


@pytest.mark.parametrize("method", ["scaled_parallel_adapter", "houlsby", "mam"])
@pytest.mark.parametrize(
    "make, layout, unnamed",
    [(sub_normed, row("bitnet"), "mlp.ffn_sub_norm"),
     (factored, changed(row("falcon_h1"), **{
         **{f: f"feed_forward.{p}" for f, p in (("in_proj", "up_proj"), ("out_proj", "down_proj"),
                                                ("gate_proj", "gate_proj"),
                                                ("activation", "act_fn"))},
         "entry": "feed_forward"}), "feed_forward.gate_multiplier")],
    ids=["BitNet", "Falcon-H1"],
)  # fmt: skip
def test_a_block_that_holds_more_runs_itself(make, layout, unnamed, method):
    model = make().eval()
    layer = base_of(model).layers[0]
    assert unnamed in unnamed_in_block(layer, layout.stacks[0].ffn)
    ids = torch.tensor([[5, 9, 11, 7]])
    with torch.no_grad():
        base = model(ids).logits
        pelt_fast.inject(model, method, layout=layout)
        for name, parameter in model.named_parameters():
            if "up_" in name.rpartition(".")[2]:
                parameter.zero_()
        if method != "mam":  # whose prefix is no update of zero
            torch.testing.assert_close(model(ids).logits, base, rtol=0, atol=1e-6)


def test_a_dropout_that_the_row_forgets_in_a_block_of_its_own_still_acts():
    config = DistilBertConfig(vocab_size=61, dim=32, hidden_dim=48, n_layers=1, n_heads=4,
                              dropout=0.5, attention_dropout=0.0)  # fmt: skip
    torch.manual_seed(0)
    model = DistilBertModel(config)
    names = ("q_lin", "k_lin", "v_lin", "out_lin")
    own = (AttentionLayout("encoder", "attention", *(f"attention.{name}" for name in names)),)
    ffn = FFNLayout("ffn", "ffn.lin1", "ffn.lin2", "ffn.activation", "activation")
    layout = Layout(
        "distilbert", (StackLayout("encoder", "transformer", "transformer.layer", own, ffn),)
    )
    pelt_fast.inject(model, "scaled_parallel_adapter", layout=layout).train()
    layer, x = model.transformer.layer[0], torch.randn(1, 3, 32)
    with torch.no_grad():
        dropped = [(layer.ffn(x) == 0).float().mean().item() for _ in range(20)]
    assert abs(sum(dropped) / 20 - 0.5) < 0.1


@pytest.mark.parametrize("training", [False, True])
def test_the_self_test_leaves_the_model_and_the_world_alone(training):
    model = biogpt().train(training)
    model.biogpt.layers[0].train(not training)
    model.register_buffer("counter", torch.zeros(1))
    model.biogpt.layers[0].register_forward_pre_hook(lambda *_: model.counter.add_(1) and None)
    modes = [module.training for module in model.modules()]
    config = pelt_fast.methods()["scaled_parallel_adapter"]
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    plain = pelt_fast.inject(biogpt(), config, layout=BIOGPT)  # what the init itself draws
    after = torch.rand(1), random.random(), numpy.random.rand()
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    again = pelt_fast.inject(biogpt(), config, layout=BIOGPT)
    assert (torch.rand(1), random.random(), numpy.random.rand()) == after
    for (_, one), (_, two) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two)
    random.seed(1), numpy.random.seed(1)
    wanted = random.random(), numpy.random.rand()
    random.seed(1), numpy.random.seed(1)
    pelt_fast.inject(model, config, layout=BIOGPT)
    assert (random.random(), numpy.random.rand()) == wanted
    assert model.counter.item() == 0
    assert all(p.grad is None for p in model.parameters())
    pelt_fast.eject(model)
    assert [module.training for module in model.modules()] == modes


def test_an_init_that_is_not_zero_survives_the_test():
    config = pelt_fast.methods()["scaled_parallel_adapter"].replace(init="bert")
    torch.manual_seed(1)
    model = pelt_fast.inject(llama(), config, layout=LLAMA)
    up = [p for n, p in model.named_parameters() if n.endswith("up_weight")]
    assert up and all(0.01 < p.std() < 0.03 for p in up)


def test_it_runs_the_base_six_times():
    """In each mode: before the method is there, once more, and with it. The norms that the layout
    names are read in one of these."""
    model, runs = llama(), []
    model.model.embed_tokens.register_forward_hook(lambda *_: runs.append(1))
    pelt_fast.inject(model, "scaled_parallel_adapter", layout=LLAMA)
    assert len(runs) == 6


def test_what_cannot_run_says_so_and_goes_on(caplog):
    with torch.device("meta"):
        model = llama()
    pelt_fast.inject(model, "lora", layout=LLAMA)
    assert "the self-test of this row could not run: weights are on the meta device" in caplog.text
