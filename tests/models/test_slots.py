"""Rows of the user's own, and the draft of one."""

from dataclasses import replace

import pytest
import torch
import transformers
from transformers import BioGptConfig, BioGptForCausalLM

import pelt_fast
from pelt_fast import AttentionLayout, FFNLayout, Layout, StackLayout
from pelt_fast.injection.attention_interface import still_wrapped
from pelt_fast.layouts.discovery import draft
from tests.models.judge import assert_untouched, state
from tests.models.test_parity import assert_fused_equals_reference
from tests.small import PAD, VOCABULARY, bert, inputs, llama, randomise

OWN = ("q_proj", "k_proj", "v_proj", "out_proj")
BIOGPT = Layout("biogpt", (StackLayout(
    "decoder", owner="", layers="layers",
    attentions=(AttentionLayout("decoder", "self_attn", *(f"self_attn.{n}" for n in OWN)),),
    ffn=FFNLayout("fc1", "fc1", "fc2", "activation_fn", "hidden_act", output_dropout="dropout",
                activation_dropout="activation_dropout", output_dropout_also=("self_attn",)),
),))  # fmt: skip


def biogpt():
    torch.manual_seed(0)
    config = dict(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, pad_token_id=PAD, layerdrop=0.0,
    )  # fmt: skip
    return BioGptForCausalLM(BioGptConfig(**config))


@pytest.mark.parametrize("method", ["lora", "prefix", "mam", "houlsby"])
def test_an_architecture_without_a_row_works_through_one_of_the_users(method, tmp_path):
    config = pelt_fast.methods()[method].replace(size=5)
    model = randomise(pelt_fast.inject(biogpt(), config, layout=BIOGPT)).train()
    assert_fused_equals_reference(model, inputs(model, padding="right"))
    pelt_fast.save(model.eval(), tmp_path)
    loaded = pelt_fast.load(biogpt(), tmp_path, layout=BIOGPT).eval()
    batch = inputs(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_row_that_is_none_or_anothers_is_refused():
    with pytest.raises(ValueError, match="layout is for 'biogpt', the model is 'llama'"):
        pelt_fast.inject(llama(), "lora", layout=BIOGPT)
    with pytest.raises(TypeError, match="layout must be a Layout, got dict"):
        pelt_fast.inject(biogpt(), "lora", layout={})
    wrong = Layout("biogpt", (StackLayout("decoder", "", "blocks", (), None),))
    with pytest.raises(ValueError, match="looked for blocks in BioGptModel"):
        pelt_fast.inject(biogpt(), "lora", layout=wrong)


@pytest.mark.parametrize("method", [
    "prefix", pelt_fast.multi_head_adapter(4, reads="input"), "multi_head_parallel_adapter",
])  # fmt: skip
def test_an_attention_that_tells_no_size_of_a_head_is_named(method):
    model = biogpt()
    for layer in model.biogpt.layers:
        del layer.self_attn.head_dim
    before = state(model)
    with pytest.raises(ValueError, match=r"self_attn \(BioGptAttention\) .* heads=\(number of key"):
        pelt_fast.inject(model, method, layout=BIOGPT)
    assert_untouched(model, before)


@pytest.mark.parametrize("method", ["prefix", "multi_head_parallel_adapter"])
def test_stacks_of_one_owner_check_the_choice_of_the_attention_once(method):
    (whole,) = BIOGPT.stacks
    halves = Layout("biogpt", tuple(replace(whole, only=(layer,)) for layer in (0, 1)))
    model = pelt_fast.inject(biogpt(), method, layout=halves)
    hooks = list(model.biogpt._forward_pre_hooks.values())
    assert hooks.count(still_wrapped) == 1
    model.config._attn_implementation = "eager"
    with pytest.raises(RuntimeError, match="its attention is 'eager' now"):
        model(**inputs(model))


def test_the_draft_of_a_known_layout_is_its_row_but_for_what_names_cannot_tell():
    text = draft(biogpt())
    names: dict = {}
    exec(text, names)  # what it prints is Python
    (stack,) = names["layout"].stacks
    assert (stack.layers, stack.attentions) == ("layers", BIOGPT.stacks[0].attentions)
    assert (stack.kind, stack.ffn) == ("decoder", BIOGPT.stacks[0].ffn)
    gated = draft(llama())
    assert "gate_proj='mlp.gate_proj'" in gated and "FFNLayout('mlp', 'mlp.up_proj'" in gated
    below = draft(bert())
    assert "StackLayout('encoder'" in below and "FFNLayout('?', '?'" in below  # a form to fill in
    assert "'attention.self.query'" in below and "'attention.output.dense'" in below


def drafted(model) -> tuple[str, Layout]:
    """The text of a draft, and what it makes."""
    text, names = draft(model), {}
    exec(text, names)
    return text, names["layout"]


def little(name: str, **changes):
    """A causal language model of transformers' with one layer."""
    fields = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                  num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(fields | changes))
    kind = getattr(transformers, f"{name}ForCausalLM", None) or getattr(
        transformers, f"{name}Model"
    )
    return kind(config)


DISTIL = dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4, dropout=0.3)
GPTJ = dict(n_embd=32, n_layer=2, n_head=4, n_inner=48, rotary_dim=4, resid_pdrop=0.3)
DRAFTED = {
    "DistilBert": (DISTIL, dict(output_dropout="ffn.dropout"), None),
    "GPTJ": (GPTJ, dict(output_dropout="mlp.dropout"), None),
    "Cohere": ({}, dict(gate_proj="mlp.gate_proj"), None),
    "Granite": (dict(residual_multiplier=0.3), {}, None),
    "BitNet": ({}, {}, "no layout names mlp.ffn_sub_norm: the block runs its own forward"),
    "FalconH1": (dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1,
                      mamba_d_state=8, head_dim=8, mlp_multipliers=[0.5, 0.25]),
                 {}, "no layout names feed_forward.gate_multiplier"),
    "BioGpt": (dict(hidden_dropout_prob=0.3, activation_dropout=0.2),
               dict(activation_dropout="activation_dropout", output_dropout="dropout",
                    output_dropout_also=("self_attn",)), None),
}  # fmt: skip


@pytest.mark.parametrize("method", ["scaled_parallel_adapter", "houlsby", "lora", "prefix"])
@pytest.mark.parametrize("name", DRAFTED)
def test_a_draft_loses_nothing(name, method):
    changes, named, said = DRAFTED[name]
    text, layout = drafted(little(name, **changes))
    assert "?" not in text.split("Layout(")[1]
    assert said is None or said in text
    (stack,) = layout.stacks
    assert {key: getattr(stack.ffn, key) for key in named} == named
    model = little(name, **changes)
    pelt_fast.inject(model, method, layout=layout)  # the self-test is the judge
    fallbacks = [site.reason for site in pelt_fast.explain(model).sites if site.op == "ffn"]
    assert all(bool(reason) == bool(said) for reason in fallbacks)


@pytest.mark.parametrize("name, changes", [
    ("Qwen2Moe", dict(num_experts=4, shared_expert_intermediate_size=24, moe_intermediate_size=24)),
    ("Mixtral", dict(num_local_experts=2)),
    ("GraniteMoeShared", dict(num_local_experts=2, shared_intermediate_size=24)),
])  # fmt: skip
def test_experts_are_no_block_of_a_draft(name, changes):
    _, layout = drafted(little(name, **changes))
    (stack,) = layout.stacks
    assert stack.ffn is None and "experts that a router chooses" in stack.no_ffn
    with pytest.raises(ValueError, match=r"no method on its FFN: .*experts that a router chooses"):
        pelt_fast.inject(little(name, **changes), "scaled_parallel_adapter", layout=layout)
    pelt_fast.inject(little(name, **changes), "lora", layout=layout)


@pytest.mark.parametrize("name, changes", [("GPTNeoX", {}), ("Bloom", dict(n_layer=1, n_head=4))])
def test_heads_one_after_another_are_left_open_in_a_draft(name, changes):
    text, layout = drafted(little(name, **changes))
    (attention,) = layout.stacks[0].attentions
    assert (attention.q, attention.k, attention.v) == ("?", "?", "?")
    assert "query_key_value holds q, k and v" in text
    with pytest.raises(ValueError, match=r"looked for .*\?"):
        pelt_fast.inject(little(name, **changes), "lora", layout=layout)


def test_a_path_that_one_layer_lacks_is_refused_by_its_name():
    model = llama()
    model.model.layers[1].mlp = torch.nn.Identity()
    text, layout = drafted(model)
    assert "not in every layer: 1.mlp.up_proj, 1.mlp.down_proj '?'" in text
    with pytest.raises(ValueError, match=r"looked for layers\.1\.mlp\.up_proj"):
        pelt_fast.inject(model, "lora_ffn", layout=layout)


def test_two_blocks_in_a_layer_are_left_open():
    model = llama()
    for layer in model.model.layers:
        layer.second = type(layer.mlp)(model.config)
    assert "2 blocks in a layer (mlp, second): which one?" in draft(model)


def test_explain_prints_the_layout_that_was_discovered(tmp_path, capsys):
    from pelt_fast.cli import main

    biogpt().config.save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Layout('biogpt'" in printed and "its layout was discovered" in printed
