"""Every preset against the paper's own code, layer by layer, written out in plain PyTorch and fp64.

The formulas are those of modeling_bart, modeling_mbart and modeling_roberta in the authors'
repository at its last commit; docs/facts.md says where a preset is not what they run.
"""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import pelt_fast
from pelt_fast.layouts.lookup import base_of
from tests.small import MODELS, inputs, randomise

# bitfit and full change no formula, prompts have tests/models/test_prompt.py
PRESETS = [
    name for name in pelt_fast.methods() if name not in ("full", "linear_probe", "bitfit", "prompt")
]
BART = dict(
    projections=("q_proj", "k_proj", "v_proj", "out_proj"), ffn=("fc1", "fc2"),
    attentions=(("self", "self_attn", "self_attn_layer_norm"),
                ("cross", "encoder_attn", "encoder_attn_layer_norm")),
    ffn_norm="final_layer_norm", layers="layers", heads="num_heads",
)  # fmt: skip
ROBERTA = dict(
    projections=("query", "key", "value", "attention.output.dense"),
    ffn=("intermediate.dense", "output.dense"),
    attentions=(("self", "attention.self", "attention.output.LayerNorm"),),
    ffn_norm="output.LayerNorm", layers="layer", heads="num_attention_heads",
)  # fmt: skip
NAMES = {"bart": BART, "mbart": BART, "roberta": ROBERTA, "bert": ROBERTA}
ACTIVATION = F.gelu  # of every small model here


def lora(linear, x):
    """x W + b, and s x A B where a LoRA is on it."""
    y, site = F.linear(x, linear.weight, linear.bias), linear._modules.get("pelt_lora")
    return y if site is None else y + site.scale * (x @ site.lora_a.T) @ site.lora_b.T


def normalise(norm, x):
    """A frozen LayerNorm, whatever runs in its place now."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def delta(site, x):
    """s (ReLU(LN(x) D + d) U + u): Adapter_Layer without its residual."""
    if site.norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], site.norm_weight, site.norm_bias)
    return site.scale * F.linear(
        F.relu(F.linear(x, site.down_weight, site.down_bias)), site.up_weight, site.up_bias
    )


def prefix_of(bank, index):
    """Key and value (H, P, D) of a layer: Embedding, Linear, Tanh, Linear, or the embedding."""
    if bank.prefix is not None:
        return bank.prefix[index]
    first, _, last = bank.mlp
    hidden = torch.tanh(F.linear(bank.embedding, first.weight, first.bias))
    layers, _, heads, length, dim = bank.shape
    flat = F.linear(hidden, last.weight, last.bias).view(length, layers, 2, heads, dim)
    return flat[:, index].permute(1, 2, 0, 3)


class Paper:
    """One layer of the paper's code on the weights and sites of ``layer``, which is ours."""

    def __init__(self, architecture, config, layer, index, prefixes):
        self.names, self.layer, self.index = NAMES[architecture], layer, index
        self.pre_norm, self.prefixes = architecture == "mbart", prefixes
        self.point = {(m.form, m.target): m for m in config.modifications}

    def __call__(self, x, mask=None, context=None, encoder_attention_mask=None, **_):
        for kind, inner, norm in self.names["attentions"]:
            if kind == "cross" and context is None:
                continue
            inner, norm = self.layer.get_submodule(inner), self.layer.get_submodule(norm)
            h = normalise(norm, x) if self.pre_norm else x
            seen = (h, mask) if kind == "self" else (context, encoder_attention_mask)
            x = x + self.attention(kind, inner, h, *seen)
            x = x if self.pre_norm else normalise(norm, x)
        return self.ffn(x)

    def attention(self, kind, inner, x, context, mask):
        *inputs, out = self.names["projections"]
        out = inner.out_proj if out == "out_proj" else self.layer.get_submodule(out)
        count = getattr(inner, self.names["heads"])
        q, k, v = (
            lora(getattr(inner, name), t).unflatten(-1, (count, -1)).transpose(1, 2)
            for name, t in zip(inputs, (x, context, context))
        )
        scale = q.shape[-1] ** -0.5
        scores = scale * q @ k.transpose(-1, -2)
        scores = scores if mask is None else scores + mask
        heads = torch.softmax(scores, -1) @ v
        if ("prefix", "heads") in self.point:
            pk, pv = prefix_of(self.prefixes[kind], self.index)
            own = scale * q @ pk.transpose(-1, -2)
            if self.point["prefix", "heads"].composition == "gated":  # attn_option concat
                weights = torch.softmax(torch.cat([own, scores], -1), -1)
                heads = weights @ torch.cat([pv.expand(len(q), -1, -1, -1), v], 2)
            else:  # cross_attn_noln
                heads = heads + torch.softmax(own, -1) @ pv
        if ("bottleneck", "heads") in self.point:  # cross_attn_relu: the query is read unscaled
            site = inner.pelt_heads
            heads = heads + F.relu(q @ site.down_weight.transpose(-1, -2)) @ site.up_weight
        heads, point = heads.transpose(1, 2).flatten(2), self.point.get(("bottleneck", "attention"))
        if point and point.insertion == "parallel":
            heads = heads + delta(out.pelt_adapter, x)
        y = lora(out, heads)
        return y + delta(out.pelt_adapter, y) if point and point.insertion == "sequential" else y

    def ffn(self, x):
        norm = partial(normalise, self.layer.get_submodule(self.names["ffn_norm"]))
        into, out = (self.layer.get_submodule(name) for name in self.names["ffn"])
        h = norm(x) if self.pre_norm else x
        y = lora(out, ACTIVATION(lora(into, h)))
        point = self.point.get(("bottleneck", "ffn"))
        after = (lambda z: z) if self.pre_norm else norm
        if point is None:
            return after(x + y)
        site = self.layer.pelt_ffn_adapter
        if point.insertion == "parallel":  # mBART's reads the stream in front of the norm
            return after(x + y + delta(site, x))
        if point.placement == "around_norm":  # Pfeiffer
            return after(x + y + delta(site, after(x + y)))
        return after(x + y + delta(site, y))


def written_out(architecture, config, model, plain):
    """``plain`` with every layer the paper's, on the weights and sites of ``model``."""
    plain.set_attn_implementation("eager")  # it hands its layers additive masks
    ours, theirs, names = base_of(model), base_of(plain), NAMES[architecture]
    for kind in ("encoder", "decoder"):
        if not hasattr(ours, kind):
            continue
        stack = getattr(ours, kind)
        prefixes = {"self": getattr(stack, f"pelt_{kind}_prefix", None),
                    "cross": getattr(stack, "pelt_cross_prefix", None)}  # fmt: skip
        for index, layer in enumerate(getattr(stack, names["layers"])):
            plain_layer = getattr(getattr(theirs, kind), names["layers"])[index]
            plain_layer.forward = Paper(architecture, config, layer, index, prefixes)
    return plain


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("architecture", NAMES)
def test_preset_is_the_papers_code(architecture, preset):
    plain = MODELS[architecture](dropout=0.0).double().eval().requires_grad_(False)
    config = pelt_fast.methods()[preset].replace(size=5, dropout=0.0)
    config = pelt_fast.PeltConfig(preset, config.modifications, train_head=False)
    model = randomise(pelt_fast.inject(copy.deepcopy(plain), config).eval())
    paper = written_out(architecture, config, model, plain)
    batch = inputs(model, padding="right")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = []
    for one in (model, paper):
        out = one(**batch)
        grads = torch.autograd.grad(out.logits.square().sum(), list(trained.values()))
        found.append({"logits": out.logits.detach(), **dict(zip(trained, grads))})
    ours, theirs = found
    assert trained and all(theirs[name].abs().sum() > 0 for name in theirs)
    for name, value in theirs.items():
        size = value.abs().max()
        assert (ours[name] - value).abs().max() <= 1e-11 * size, name
