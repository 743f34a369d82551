"""Rows of the user's own, and the draft of one."""

import pytest
import torch
from transformers import BioGptConfig, BioGptForCausalLM

import pelt_fast
from pelt_fast import AttentionSlot, FFNSlot, SlotMap, StackSlot
from pelt_fast.models.draft import draft
from tests.models.test_parity import assert_fused_equals_reference
from tests.small import PAD, VOCABULARY, bert, inputs, llama, randomise

OWN = ("q_proj", "k_proj", "v_proj", "out_proj")
BIOGPT = SlotMap("biogpt", (StackSlot(
    "decoder", owner="", layers="layers",
    attentions=(AttentionSlot("decoder", "self_attn", *(f"self_attn.{n}" for n in OWN)),),
    ffn=FFNSlot("fc1", "fc1", "fc2", "activation_fn", "hidden_act", output_dropout="dropout",
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
    with pytest.raises(ValueError, match=r"no table row for architecture 'biogpt'.*SlotMap"):
        pelt_fast.inject(biogpt(), method)
    config = pelt_fast.methods()[method].replace(size=5)
    model = randomise(pelt_fast.inject(biogpt(), config, slots=BIOGPT)).train()
    assert_fused_equals_reference(model, inputs(model, padding="right"))
    pelt_fast.save(model.eval(), tmp_path)
    loaded = pelt_fast.load(biogpt(), tmp_path, slots=BIOGPT).eval()
    batch = inputs(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_row_that_is_none_or_anothers_is_refused():
    with pytest.raises(ValueError, match="slots is for 'biogpt', the model is 'llama'"):
        pelt_fast.inject(llama(), "lora", slots=BIOGPT)
    with pytest.raises(TypeError, match="slots must be a SlotMap, got dict"):
        pelt_fast.inject(biogpt(), "lora", slots={})
    wrong = SlotMap("biogpt", (StackSlot("decoder", "", "blocks", (), None),))
    with pytest.raises(ValueError, match="looked for blocks in BioGptModel"):
        pelt_fast.inject(biogpt(), "lora", slots=wrong)


def test_the_draft_of_a_known_layout_is_its_row_but_for_what_names_cannot_tell():
    text = draft(biogpt())
    names: dict = {}
    exec(text, names)  # what it prints is Python
    (stack,) = names["slots"].stacks
    assert (stack.layers, stack.attentions) == ("layers", BIOGPT.stacks[0].attentions)
    assert (stack.ffn.in_proj, stack.ffn.out_proj) == ("fc1", "fc2")
    assert (stack.kind, stack.ffn.config_activation) == ("decoder", "hidden_act")
    gated = draft(llama())
    assert "gate_proj='mlp.gate_proj'" in gated and "FFNSlot('mlp', 'mlp.up_proj'" in gated
    below = draft(bert())
    assert "StackSlot('encoder'" in below and "FFNSlot('?', '?'" in below  # a form to fill in
    assert "'attention.self.query'" in below and "'attention.output.dense'" in below


def test_explain_prints_the_draft(tmp_path, capsys):
    from pelt_fast.cli import main

    biogpt().config.save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path)]) == 1
    assert "SlotMap('biogpt'" in capsys.readouterr().out
