"""Quantised bases: the method rides on whatever linear layer is there. torchao int8 and bitsandbytes
nf4 / int8 where they are installed; everywhere a layer that keeps int8 rows, and one that has no
weight but what GPTQ packs."""

import copy
import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pelt_fast
from pelt_fast.modules.projection_view import is_linear
from tests.docs.blocks import ROOT, blocks_of
from tests.models.test_parity import assert_close, small_method
from tests.small import MODELS, MORE, gradients, inputs, randomise


class Int8Linear(nn.Linear):
    """Rows of int8 and a scale each; the product is of the numbers they stand for."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, "meta")
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        rows = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.register_buffer("row_scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.row_scale.to(x.dtype), self.bias)


class PackedLinear(nn.Module):
    """GPTQ's layout: eight 4-bit rows of the transposed weight in an int32, a scale and a zero for
    each group of 32 inputs, and no weight at all."""

    GROUP = 32

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        groups = linear.weight.detach().t().unflatten(0, (-1, self.GROUP))  # (G, 32, N)
        low, high = groups.amin(1), groups.amax(1)
        self.register_buffer("scales", (high - low) / 15)  # (G, N)
        self.register_buffer("zeros", low)
        four = ((groups - low[:, None]) / self.scales[:, None]).round().to(torch.int32)
        eights = four.flatten(0, 1).unflatten(0, (-1, 8))  # (K / 8, 8, N)
        self.register_buffer(
            "qweight", sum(eights[:, i] << 4 * i for i in range(8)).to(torch.int32)
        )
        self.bias = linear.bias

    def forward(self, x):
        four = torch.stack([self.qweight >> 4 * i & 15 for i in range(8)], 1).flatten(0, 1)
        groups = four.unflatten(0, (-1, self.GROUP)) * self.scales[:, None] + self.zeros[:, None]
        return F.linear(x, groups.flatten(0, 1).t().to(x.dtype), self.bias)


class Float8Linear(nn.Linear):
    """Rows of float8 and a scale each. It saves no number but these for backward."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, rows, scale, bias):
            ctx.save_for_backward(rows, scale)
            return F.linear(x, (rows.float() * scale).to(x.dtype), bias)

        @staticmethod
        def backward(ctx, dy):
            rows, scale = ctx.saved_tensors
            return dy @ (rows.float() * scale).to(dy.dtype), None, None, None

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, "meta")
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 448
        rows = (linear.weight.detach() / scale).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.register_buffer("row_scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return self.Product.apply(x, self.weight, self.row_scale, self.bias)


def gemma(linear: nn.Linear) -> nn.Module:
    """transformers' own int8 layer."""
    quant = pytest.importorskip("transformers.integrations.gemma_quant")
    new = quant.QuantizedLinear(linear.in_features, linear.out_features, linear.bias is not None)
    scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    new.weight_scale = nn.Parameter(scale)
    new.weight.data = (linear.weight.detach() / scale).round().to(torch.int8)
    new.bias = linear.bias
    return new


def own(kind):
    def quantise(model: nn.Module) -> None:
        for name, module in list(model.named_modules()):
            for child, linear in list(module.named_children()):
                if type(linear) is nn.Linear and "head" not in child and "classifier" not in name:
                    setattr(module, child, kind(linear))

    return quantise


def torchao(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: (
        type(module) is nn.Linear and "head" not in name and "classifier" not in name
    ))  # fmt: skip


def bitsandbytes(kind: str):
    def quantise(model: nn.Module) -> None:
        import bitsandbytes as bnb

        for name, module in list(model.named_modules()):
            for child, linear in list(module.named_children()):
                if type(linear) is not nn.Linear or "head" in child or "classifier" in name:
                    continue
                data, sizes = linear.weight.data, (linear.in_features, linear.out_features)
                bias = linear.bias is not None
                if kind == "nf4":
                    new = bnb.nn.Linear4bit(*sizes, bias=bias, quant_type="nf4")
                    new.weight = bnb.nn.Params4bit(data, requires_grad=False, quant_type="nf4")
                else:
                    new = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
                    new.weight = bnb.nn.Int8Params(data, requires_grad=False)
                new.bias = linear.bias
                setattr(module, child, new.to("cpu"))

    return quantise


def needs(package: str):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


QUANTISED = [
    pytest.param(own(Int8Linear), id="int8 rows"),
    pytest.param(own(PackedLinear), id="4-bit groups, as GPTQ packs"),
    pytest.param(own(Float8Linear), id="float8 rows"),
    pytest.param(own(gemma), id="transformers int8"),
    pytest.param(torchao, id="torchao int8", marks=needs("torchao")),
    pytest.param(bitsandbytes("nf4"), id="bitsandbytes nf4", marks=needs("bitsandbytes")),
    pytest.param(bitsandbytes("int8"), id="bitsandbytes int8", marks=needs("bitsandbytes")),
]
METHODS = ["lora", "lora_ffn", "houlsby", "mam", "multi_head_parallel_adapter", "pfeiffer"]


def base(architecture: str, quantise):
    torch.manual_seed(0)
    wide = dict(hidden_size=64, intermediate_size=128) if architecture != "bart" else dict(
        d_model=64, encoder_ffn_dim=128, decoder_ffn_dim=128
    )  # fmt: skip
    model = MODELS[architecture](dropout=0.0, **wide)
    quantise(model)
    return model


def readable(model: nn.Module) -> nn.Module:
    """The same model of plain layers: each weight is what the quantised layer makes of a unit."""
    for module in list(model.modules()):
        for name, linear in list(module.named_children()):
            if not is_linear(linear) or (
                type(linear) is nn.Linear and type(linear.weight.data) is torch.Tensor
            ):
                continue
            plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
            with torch.no_grad():
                rows = linear(torch.eye(linear.in_features)).float()
                if linear.bias is not None:
                    rows -= linear.bias
                    plain.bias.copy_(linear.bias)
                plain.weight.copy_(rows.t())
            setattr(module, name, plain.requires_grad_(False))
    return model


@pytest.mark.parametrize("quantise", QUANTISED)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "bart"])
def test_a_method_on_a_quantised_base_is_the_method_on_what_it_stands_for(
    architecture, method, quantise
):
    model = base(architecture, quantise)
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    randomise(pelt_fast.inject(model, small_method(method, dropout=0.0))).train()
    readable(plain)
    pelt_fast.inject(plain, small_method(method, dropout=0.0)).train()
    wanted = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                wanted[name].copy_(parameter)
    batch = inputs(model)
    found = []
    for each in (model, plain):
        out = each(**batch)
        out.loss.backward()
        found.append({"logits": out.logits.detach(), **gradients(each)})
    # bitsandbytes' int8 rounds the activations too, which the plain layer does not
    rounds = any(type(m).__name__ == "Linear8bitLt" for m in model.modules())
    assert_close(found[0], found[1], 0.2 if rounds else 2e-3)


@pytest.mark.parametrize("quantise", QUANTISED)
def test_eject_save_load_and_the_refusal_to_merge(quantise, tmp_path):
    model = base("llama", quantise)
    batch = inputs(model.eval())
    with torch.no_grad():
        plain = model(**batch).logits
        randomise(pelt_fast.inject(model, small_method("lora")))
        logits = model.eval()(**batch).logits
    with pytest.raises(ValueError, match="LoRA on a quantised weight"):
        pelt_fast.merge(model)
    pelt_fast.save(model, tmp_path)
    assert str(pelt_fast.explain(model))
    pelt_fast.eject(model)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain)
        assert torch.allclose(pelt_fast.load(model, tmp_path).eval()(**batch).logits, logits)


def test_a_fused_projection_that_is_quantised_is_refused():
    model = MORE["phi3"]()
    own(Int8Linear)(model)
    with pytest.raises(ValueError, match=r"a fused projection .* is quantised"):
        pelt_fast.inject(model, small_method("lora"))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="it is an extra")
def test_the_page_on_quantised_bases_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, namespace = ROOT / "docs" / "how-to" / "quantised-bases.md", {}
    for block in blocks_of(page.read_text()):
        exec(block.compiled(page), namespace)
    before = namespace["AutoModelForCausalLM"].from_pretrained("my-llama", dtype=torch.bfloat16)
    after = dict(namespace["whole"].named_parameters())
    changed = [n for n, p in before.named_parameters() if not torch.equal(p, after[n])]
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="it is an extra")
def test_the_example_beside_other_libraries_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, namespace = ROOT / "docs" / "how-to" / "with-other-libraries.md", {}
    setup, first, *others = blocks_of(page.read_text())
    (four_bits,) = [block for block in others if "BitsAndBytesConfig" in block.code]
    for block in (setup, first, four_bits):
        exec(block.compiled(page), namespace)
    tokens = namespace["tokenizer"]("The Danube", return_tensors="pt")
    model = namespace["model"]
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    model(**tokens, labels=tokens["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
