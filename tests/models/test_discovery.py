"""Layouts that are found on the model itself, the parts that a method asks for, and BERT's kin."""

import copy
import dataclasses

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import FalconConfig, FalconForCausalLM

import pelt_fast
from benchmarks.architectures import cells, formula, tiny
from pelt_fast import Layout, StackLayout
from pelt_fast.injection.discovery import blocks
from pelt_fast.injection.discovery.discover import discover
from pelt_fast.injection.synthetic_batch import synthetic_batch
from pelt_fast.layouts import layout as layouts
from pelt_fast.layouts.discovery import draft
from pelt_fast.layouts.lookup import base_of, stacks_of
from pelt_fast.layouts.table import _LIKE_BERT, ROWS
from pelt_fast.layouts.written import DISCOVERED, written
from tests.models.judge import assert_near, assert_untouched, state
from tests.models.test_slots import BIOGPT, biogpt
from tests.small import MODELS, MORE, VOCABULARY, inputs, llama, randomise

FAMILIES = tiny.families()
# each shows another thing that discovery must find
HELD = [
    ("distilbert", "mam"),  # a container with a dropout of its own
    ("biogpt", "mam"),  # the layer spells the block out
    ("gpt_neox", "lora"),  # q, k and v head by head in one matrix
    ("codegen", "lora"),  # and in four parts
    ("gpt_bigcode", "lora"),  # one key head beside all query heads, in a Conv1D's rows or Linear's
    ("bamba", "mam"),  # layers that differ: one has no attention
    ("albert", "houlsby"),  # one layer, run twice
    ("marian", "prefix"),  # an encoder, a decoder and its cross-attention
    ("llava", "scaled_parallel_adapter"),  # the language model of a model that sees
    ("clip", "pfeiffer"),  # images
    ("falcon", "houlsby"),  # an attention that its module computes itself
    ("timesformer", "lora"),  # two self-attentions in a layer
    ("olmoe", "lora"),  # experts: no block, and LoRA does not ask for one
]
# method, and the words that its refusal has
REFUSED = [
    ("falcon", "prefix", "keys and values that a prefix can stand before: its module computes"),
    ("olmoe", "scaled_parallel_adapter", "experts that a router chooses"),
    ("bitnet", "scaled_parallel_adapter", "no two linear layers with act"),
    ("deepseek_v3", "prefix", "values .* have other sizes"),
    ("fnet", "lora", "no table row for architecture 'fnet', and its layout was not found"),
    ("gpt_oss", "prefix", "attention sinks"),
]


def family(kind: str) -> cells.Family:
    return cells.Family(kind, FAMILIES[kind][1])


@pytest.mark.parametrize("kind, method", HELD)
def test_a_family_without_a_row_is_what_hooks_on_its_base_are(kind, method):
    assert all(row.model_type != kind for row in ROWS)
    assert cells.cell(family(kind), method)["holds"]


@pytest.mark.parametrize("kind, method, why", REFUSED)
def test_what_was_not_found_is_refused_by_its_reason_and_nothing_is_changed(kind, method, why):
    model = family(kind).made()
    before = state(model)
    with pytest.raises(ValueError, match=why):
        pelt_fast.inject(model, cells.config_of(method))
    assert_untouched(model, before)


@pytest.mark.parametrize("what", ["_update_of", "_combined"])
def test_the_measure_sees_a_wrong_number(what, monkeypatch):
    right, method = getattr(formula, what), {"_update_of": "lora", "_combined": "prefix"}[what]
    if what == "_update_of":
        monkeypatch.setattr(formula, what, lambda *a: lambda x: 1.02 * right(*a)(x))
    else:
        monkeypatch.setattr(formula, what, lambda *a: right(*a[:-1], 1.1 * a[-1]))
    with pytest.raises(cells.Wrong, match=r"is off by|takes no part"):
        cells.cell(family("llama"), method)


def test_explain_says_that_it_was_discovered_and_prints_a_layout_that_works():
    model = pelt_fast.inject(family("distilbert").made(), "lora")
    explanation = pelt_fast.explain(model)
    assert DISCOVERED in str(explanation) and explanation.layout in str(explanation)
    again = eval(explanation.layout, vars(layouts))
    assert again == model._pelt.layout and written(again) == explanation.layout
    named = pelt_fast.inject(family("distilbert").made(), "lora", layout=again)
    assert [s.name for s in named._pelt.sites] == [s.name for s in model._pelt.sites]
    assert pelt_fast.explain(pelt_fast.inject(llama(), "lora")).layout == ""


def test_a_discovered_layout_that_is_passed_back_has_its_refusals():
    """The queries are made of a low-rank projection of the input: an adapter would read the wrong
    tensor."""
    model = tiny.model("axk1", FAMILIES["axk1"][1], q_lora_rank=32)
    layout, before = discover(model), state(model)
    for given in (None, layout):
        with pytest.raises(ValueError, match="needs an input that its queries are made of") as told:
            pelt_fast.inject(model, "parallel_adapter_attn", layout=given)
        assert "no row" not in str(told.value)
        assert_untouched(model, before)


class Counting(nn.Module):
    """An activation whose calls can be seen afterwards: it draws, and counts in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x + torch.rand(()) if self.training else x


def test_the_search_for_activations_leaves_buffers_and_random_states():
    """It calls the model's own modules, in evaluation mode."""
    model = tiny.model("dinov2", FAMILIES["dinov2"][1], drop_path_rate=0.5)
    base = base_of(model)
    for layer in base.encoder.layer:
        layer.mlp._modules = {"first": Counting(), **layer.mlp._modules}  # tried first
    model.train()
    before, drawn = state(model), torch.get_rng_state()
    assert discover(model).stacks[0].ffn is not None
    assert torch.equal(torch.get_rng_state(), drawn) and model.training
    assert_untouched(model, before)


def test_a_dropout_a_batch_norm_and_a_forward_are_no_activations():
    forward = nn.GELU().forward
    for module in (nn.Dropout1d(), nn.AlphaDropout(), nn.BatchNorm1d(4), nn.InstanceNorm1d(4)):
        assert not blocks._may_activate("act", module)
    assert not blocks._may_activate("forward", forward)
    assert blocks._may_activate("act", forward) and blocks._may_activate("act", nn.GELU())


def test_the_measure_sees_a_weight_that_eject_left_changed(monkeypatch):
    right = cells.inject.eject

    def eject(model):
        right(model)
        with torch.no_grad():
            next(model.parameters()).view(-1)[0].add_(1)

    monkeypatch.setattr(cells.inject, "eject", eject)
    with pytest.raises(cells.Wrong, match="is not what it was"):
        cells.cell(family("llama"), "lora")


def test_a_discovered_model_is_saved_loaded_and_merged(tmp_path):
    made = family("gpt_neox")
    model = randomise(pelt_fast.inject(made.made(), cells.config_of("lora"))).eval()
    with torch.no_grad():
        expected, exact = made.run(model), made.run(copy.deepcopy(model).double())
        pelt_fast.save(model, tmp_path)
        loaded = pelt_fast.load(made.made(), tmp_path).eval()
        assert torch.equal(made.run(loaded), expected)
        pelt_fast.merge(model)
        assert_near(made.run(model), expected, exact)
    pelt_fast.eject(model)
    weights = made.plain.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_peft_reads_the_rows_of_a_discovered_model_and_back(tmp_path):
    made = family("gpt_neox")
    model = randomise(pelt_fast.inject(made.made(), cells.config_of("lora"))).eval()
    pelt_fast.export_peft(model, tmp_path)
    theirs = PeftModel.from_pretrained(made.made(), tmp_path).eval()
    again = pelt_fast.load_peft(made.made(), tmp_path).eval()
    with torch.no_grad():
        expected, exact = made.run(model), made.run(copy.deepcopy(model).double())
        assert_near(made.run(theirs.get_base_model()), expected, exact)
        assert torch.equal(made.run(again), expected)


@pytest.mark.parametrize("name", [*MODELS, *MORE])
def test_discovery_finds_the_rows_of_the_table(name):
    torch.manual_seed(0)
    model = {**MODELS, **MORE}[name]()
    if name == "deberta-v2":  # the sum of three products is no attention that discovery knows
        with pytest.raises(ValueError, match="its layout was not found"):
            discover(model)
        return
    for found, row in zip(discover(model).stacks, stacks_of(model), strict=True):
        assert (found.kind, found.owner, found.layers) == (row.kind, row.owner, row.layers)
        for one, two in zip(found.attentions, row.attentions, strict=True):
            assert [_matrix(getattr(one, part)) for part in ("module", *"qkv", "out")] == [
                _matrix(getattr(two, part)) for part in ("module", *"qkv", "out")
            ]
            assert (one.kind, one.unknown) == (two.kind, ())
        told = {} if row.ffn is None else dict(
            config_activation=row.ffn.config_activation, adapter_reads=row.ffn.adapter_reads
        )  # fmt: skip
        assert (found.ffn and dataclasses.replace(found.ffn, **told)) == row.ffn


def _matrix(path: str) -> str:
    """A path without the rows of a part, which a row names by the config's heads."""
    return path.partition("=")[0]


def unknown_ffn(layout: Layout) -> Layout:
    """A layout whose FFN nobody knows."""
    stacks = tuple(
        dataclasses.replace(stack, ffn=dataclasses.replace(stack.ffn, in_proj="?", out_proj="?"))
        for stack in layout.stacks
    )
    return dataclasses.replace(layout, stacks=stacks)


@pytest.mark.parametrize("method", ["lora", "prefix", "bitfit", "parallel_adapter_attn"])
def test_a_method_asks_for_the_parts_that_it_uses_alone(method):
    layout, model = unknown_ffn(BIOGPT), biogpt()
    pelt_fast.inject(model, method, layout=layout)
    model(**inputs(model)).loss.backward()
    for needs_it in ("lora_ffn", "mam"):
        with pytest.raises(ValueError, match=r"looked for layers\.0\.\?"):
            pelt_fast.inject(biogpt(), needs_it, layout=layout)


def test_every_layer_is_checked_not_the_first_alone():
    model = biogpt()
    model.biogpt.layers[1].self_attn.v_proj = None
    del model.biogpt.layers[1].self_attn._modules["v_proj"]
    with pytest.raises(ValueError, match=r"looked for layers\.1\.self_attn\.v_proj"):
        pelt_fast.inject(model, "lora", layout=BIOGPT)


def test_layers_that_differ_are_several_stacks_of_one_list():
    model = family("bamba").made()
    stacks = discover(model).stacks
    assert [(s.layers, s.only, len(s.attentions)) for s in stacks] == [
        ("layers", (0,), 0), ("layers", (1,), 1),
    ]  # fmt: skip
    pelt_fast.inject(model, "lora", layers=[0, 1])
    assert {site.name.split(".")[1] for site in model._pelt.sites} == {"1"}
    with pytest.raises(ValueError, match="has 2 layers, from 0: there is no layer 2"):
        pelt_fast.inject(family("bamba").made(), "lora", layers=[2])


def test_experts_by_the_name_of_their_class_are_no_block_and_none_of_a_draft():
    model = llama()
    for layer in model.model.layers:
        layer.mlp.__class__ = type("LlamaExperts", (type(layer.mlp),), {})
    (stack,) = discover(model).stacks
    assert stack.ffn is None and stack.no_ffn.startswith("mlp: experts that a router chooses")
    assert f"ffn=None, no_ffn={stack.no_ffn!r}" in draft(model)


def test_a_norm_inside_a_block_is_seen():
    """What a formula of names alone would take for a block."""
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2,
                          num_attention_heads=4)  # fmt: skip
    model = FalconForCausalLM(config).eval()
    assert discover(model).stacks[0].ffn is not None
    for layer in model.transformer.h:
        layer.mlp.act = nn.Sequential(nn.GELU(), nn.LayerNorm(128))
    assert discover(model).stacks[0].ffn is None


@pytest.mark.parametrize("kind", _LIKE_BERT)
def test_berts_kin_is_built_as_bert_is(kind):
    class_name = FAMILIES.get(kind, ("", "SplinterModel"))[1]
    row = next(row for row in ROWS if row.model_type == kind)
    refused = []
    for method in cells.METHODS:
        try:  # a layout of the caller's proves itself
            pelt_fast.inject(tiny.model(kind, class_name), cells.config_of(method), layout=row)
        except ValueError as error:
            assert "computes its attention itself" in str(error)
            refused.append(method)
    assert refused == ([] if kind not in ("luke", "tapas") else [
        "multi_head_parallel_adapter", "prefix", "mam",
    ])  # fmt: skip


@pytest.mark.parametrize("kind", _LIKE_BERT)
def test_a_prompt_is_put_where_berts_is(kind):
    class_name = FAMILIES.get(kind, ("", "SplinterModel"))[1]
    plain = tiny.model(kind, class_name).double()
    config = pelt_fast.methods()["prompt"].replace(size=5)
    model = randomise(pelt_fast.inject(copy.deepcopy(plain), config), 1.0)
    base, batch, summed = base_of(plain), synthetic_batch(base_of(plain)), {}
    hook = base.embeddings.LayerNorm.register_forward_pre_hook(lambda m, a: summed.update(x=a[0]))
    base(**batch)
    hook.remove()
    (prompt,) = (m for n, m in model.named_modules() if n.endswith("pelt_prompt"))
    first = prompt.embedding.expand(len(batch["input_ids"]), -1, -1)
    hidden = base.embeddings.LayerNorm(torch.cat([first, summed["x"]], 1))
    for layer in base.encoder.layer:
        hidden = layer(hidden, None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    assert torch.allclose(base_of(model)(**batch)[0], hidden[:, 5:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("wrapped", [False, True])
def test_compiled_layers_are_found_by_their_own_names(wrapped):
    made = family("olmo")
    model = made.made()
    for index, layer in enumerate(model.model.layers):
        if wrapped:
            model.model.layers[index] = torch.compile(layer, backend="eager")
        else:
            layer.compile(backend="eager")
    plain = pelt_fast.inject(made.made(), "mam")
    pelt_fast.inject(model, "mam")
    assert model._pelt.layout == plain._pelt.layout
    assert [s.name for s in model._pelt.sites] == [s.name for s in plain._pelt.sites]


def test_the_stages_of_a_model_are_lists_of_their_own():
    stacks = discover(family("mobilevit").made()).stacks
    assert [stack.layers for stack in stacks] == [
        f"encoder.layer.{stage}.transformer.layer" for stage in (2, 3, 4)
    ]
    assert all(stack.ffn is not None and len(stack.attentions) == 1 for stack in stacks)


def test_a_layer_may_have_two_attentions_of_one_kind():
    (stack,) = discover(family("timesformer").made()).stacks
    assert (stack.layers, stack.only) == ("encoder.layer", None)
    modules = [attention.module for attention in stack.attentions]
    assert modules == ["temporal_attention.attention", "attention.attention"]
    # fsmt's cross-attention is not told from its self-attention
    assert [s.layers for s in discover(family("fsmt").made()).stacks] == [
        "encoder.layers", "decoder.layers",
    ]  # fmt: skip


def test_a_buffer_that_a_forward_replaces_comes_back():
    model = family("ibert").made()
    before = state(model)
    with pytest.raises(ValueError, match="with it fails"):
        pelt_fast.inject(model, cells.config_of("lora"))
    assert_untouched(model, before)


def test_a_stack_names_its_own_layers():
    own = StackLayout("decoder", "", "layers", BIOGPT.stacks[0].attentions, None, only=(1,))
    model = pelt_fast.inject(biogpt(), "prefix", layout=Layout("biogpt", (own,)))
    assert [site.name for site in model._pelt.sites] == ["layers.1.self_attn"]
