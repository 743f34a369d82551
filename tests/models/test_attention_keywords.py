"""Every keyword an attention may be handed is known; windows, chunks and both directions come in
through the mask, and a prefix stands beside them as if it were concatenated."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pelt_fast
from pelt_fast import AttentionLayout, Layout, StackLayout
from pelt_fast.injection import attention_keywords
from pelt_fast.injection.attention_interface import SLICE
from tests.small import MODELS, MORE, VOCABULARY, causal, inputs, llama, randomise

LLAMA4 = dict(
    config="Llama4TextConfig", intermediate_size_mlp=48, num_local_experts=2,
    attention_chunk_size=4, num_experts_per_tok=1, interleave_moe_layer_step=2,
    no_rope_layers=[1, 0],
)  # fmt: skip
GPT_OSS = dict(num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
LAYOUTS = {
    "gemma3_text": MORE["gemma3_text"],
    "gemma3_text, both directions": causal(
        "Gemma3", config="Gemma3TextConfig", query_pre_attn_scalar=8, sliding_window=4,
        use_bidirectional_attention=True,
    ),
    "llama4_text": causal("Llama4", **LLAMA4),
    "mistral": MORE["mistral"],
    "modernbert": MORE["modernbert"],
    "t5": MODELS.get("t5", MORE["t5"]),
}  # fmt: skip


def own_row(kind: str, owner: str = "", layers: str = "layers") -> Layout:
    attention = AttentionLayout("decoder", "self_attn", *(f"self_attn.{x}_proj" for x in "qkvo"))
    stack = StackLayout("decoder", owner, layers, (attention,), None, no_ffn="experts")
    return Layout(kind, (stack,))


def by_hand(module, query, key, value, mask, dropout=0.0, scaling=None, position_bias=None, **_):
    """Attention over [prefix; keys], spelled out."""
    prefix_k, prefix_v = module.__dict__["by_hand"]
    groups = query.shape[1] // key.shape[1]
    key, value, prefix_k, prefix_v = (
        x.repeat_interleave(groups, -3) for x in (key, value, prefix_k, prefix_v)
    )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = scaling * query @ key.transpose(-1, -2)
    scores = scores if position_bias is None else scores + position_bias
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask > -1
        scores = scores.masked_fill(~seen, -torch.inf)
    both = torch.cat([scaling * query @ prefix_k.transpose(-1, -2), scores], -1).softmax(-1)
    size = prefix_k.shape[-2]
    out = both[..., :size] @ prefix_v + both[..., size:] @ value
    return out.transpose(1, 2), None


@pytest.fixture
def concatenation():
    ALL_ATTENTION_FUNCTIONS.register("by_hand", by_hand)
    ALL_MASK_ATTENTION_FUNCTIONS.register("by_hand", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@pytest.mark.parametrize("choice", ["sdpa", "eager"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_prefix_is_a_concatenation_under_every_mask(name, choice, concatenation):
    torch.manual_seed(0)
    model = LAYOUTS[name]().double().eval()
    batch = inputs(model, padding="right")
    llama4 = own_row("llama4_text", "model", "model.layers")
    layout = llama4 if name == "llama4_text" else None
    model.set_attn_implementation(choice)
    base = model(**batch).logits
    config = pelt_fast.methods()["prefix_nomlp"].replace(size=3)
    config = dataclasses.replace(config, train_head=False)
    randomise(pelt_fast.inject(model, config, layout=layout), 1.0)
    with torch.no_grad():
        found = model(**batch).logits
        for module in model.modules():
            if SLICE in module.__dict__:
                module.by_hand = tuple(x.detach() for x in module.__dict__[SLICE](1.0))
        pelt_fast.eject(model)
        model.set_attn_implementation("by_hand")
        wanted = model(**batch).logits
    assert (wanted - base).norm() > 1e-3 * base.norm()
    seen = batch["attention_mask"].bool()
    rows = seen if wanted.shape[:2] == seen.shape else slice(None)
    # fp64 has no wider judge: the same sums in another order, 64 units of the largest value's eps
    size = wanted[rows].abs().max() * torch.finfo(torch.float64).eps
    assert (found[rows] - wanted[rows]).abs().max() <= 64 * size


def test_every_keyword_that_transformers_names_is_in_a_list():
    known = {*attention_keywords.UNDERSTOOD, *attention_keywords.HARMLESS,
             *attention_keywords.REFUSED}  # fmt: skip
    folder, seen = Path(transformers.__file__).parent / "models", {}
    for file in folder.glob("*/modeling_*.py"):
        for call in _calls(file.read_text(encoding="utf-8")):
            names = attention_keywords.calls(ast.parse(call))
            seen |= dict.fromkeys((name for name, _ in names), file.name)
    assert {"s_aux", "sliding_window", "position_bias", "softcap", "indices"} <= set(seen)
    assert {name: file for name, file in seen.items() if name not in known} == {}


def _calls(text: str) -> list[str]:
    """The calls of an attention function in a file (parsing files whole takes half a minute)."""
    found = []
    for match in re.finditer(r"attention_interface\(", text):
        depth = 0
        for end in range(match.end() - 1, len(text)):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            if depth == 0:
                found.append(text[match.start() : end + 1])
                break
    return found


@pytest.mark.parametrize("name", [*MODELS, *MORE])
def test_every_keyword_that_comes_in_a_forward_is_in_a_list(name):
    seen = set()
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def recording(module, query, key, value, mask, **kwargs):
        seen.update(key for key, value in kwargs.items() if value is not None)
        return own(module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("pelt_recording", recording)
    ALL_MASK_ATTENTION_FUNCTIONS.register("pelt_recording", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = {**MODELS, **MORE}[name]().eval()
    if name in ("deberta-v2", "gemma2"):
        pytest.skip("its attention carries no prefix, and says so at inject")
    model.set_attn_implementation("pelt_recording")
    model(**inputs(model), output_hidden_states=True)
    assert seen and seen <= attention_keywords.UNDERSTOOD | set(attention_keywords.HARMLESS)


@pytest.mark.parametrize("choice", ["sdpa", "eager"])
def test_attention_sinks_are_refused_at_inject(choice):
    model = causal("GptOss", **GPT_OSS)()
    model.set_attn_implementation("eager")  # the only one that transformers gives it here
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"GptOssAttention hands its attention 'sinks'"):
        pelt_fast.inject(model, "prefix", layout=own_row("gpt_oss"))
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    pelt_fast.inject(model, "lora", layout=own_row("gpt_oss"))  # which has no use for them


def test_a_keyword_that_the_code_names_is_read_from_the_module():
    class Attention(torch.nn.Module):
        strange = None

        def forward(self, x, attention_interface=None):
            return attention_interface(self, x, x, x, None, strange=self.strange, scaling=2.0)

    module = Attention()
    attention_keywords.check_known(module)
    module.strange = 3
    with pytest.raises(ValueError, match=r"'strange' .a keyword that pelt_fast does not"):
        attention_keywords.check_known(module)


@pytest.mark.parametrize("choice", ["sdpa", "eager"])
@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "head_mask", "something_new"])
def test_a_keyword_that_comes_with_a_forward_is_refused_by_name(keyword, choice):
    model = llama().eval()
    model.set_attn_implementation(choice)
    pelt_fast.inject(model, "prefix")
    ids = torch.randint(4, VOCABULARY, (2, 5))
    model(ids, **{keyword: None})
    with pytest.raises(ValueError, match=f"LlamaAttention hands its attention '{keyword}'"):
        model(ids, **{keyword: 1.0})
