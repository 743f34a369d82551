"""LoRA by name: endings, regular expressions, all linear layers, patterns, on any module."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.pytorch_utils import Conv1D

import pelt_fast
from pelt_fast import Modification, PeltConfig, lora
from pelt_fast.config.named_modules import targets_of
from pelt_fast.tasks import recipe as recipes
from pelt_fast.words import changed, parsed
from tests.models.test_parity import assert_close
from tests.small import bert, gpt2, gradients, inputs, llama, randomise, t5


class Block(nn.Module):
    """A model of a user's own: it has no config, and no row."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.gate = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width, bias=False)
        self.down, self.norm = Conv1D(width, 3 * width), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.down(torch.sigmoid(self.gate(self.norm(x))) * self.up(self.norm(x)))


class Own(nn.Module):
    def __init__(self, width: int = 20):
        super().__init__()
        self.embed, self.patch = nn.Embedding(30, width), nn.Conv2d(3, width, 1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.mixer = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.mixer(x, x, x)[0] + x)


def neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, hidden_dropout=0.0, attention_dropout=0.0,
    ))  # fmt: skip


MAKERS = {"llama": llama, "neox": neox, "own": Own, "gpt2": lambda: gpt2(dropout=0.0),
          "bert": lambda: bert(dropout=0.0)}  # fmt: skip


def loss_of(model):
    """A scalar of a seeded batch."""
    torch.manual_seed(5)
    ids = torch.randint(4, 30, (2, 7))
    out = model(input_ids=ids).logits if hasattr(model, "config") else model(ids)
    return out.detach(), (out * torch.randn_like(out)).sum()


def sites_of(model) -> dict:
    return {site.name: site.module for site in model._pelt.sites}


def twins(maker, targets, **words):
    """A model of ours and of PEFT with the same LoRA."""
    torch.manual_seed(1)
    base = MAKERS[maker]()
    model = pelt_fast.inject(copy.deepcopy(base), lora(4, 6, targets=targets, dropout=0, **words))
    names = words.get("patterns") or {}
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, bias="none",
        layers_to_transform=list(words["layers"]) if "layers" in words else None,
        rank_pattern={name: value["r"] for name, value in names.items() if "r" in value},
        alpha_pattern={name: value["alpha"] for name, value in names.items() if "alpha" in value},
        task_type="SEQ_CLS" if maker == "bert" else None,
        modules_to_save=["classifier"] if maker == "bert" else None,
    )  # fmt: skip
    theirs = peft.get_peft_model(base, config)
    for layer in theirs.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            with torch.no_grad():
                layer.lora_B["default"].weight.normal_(std=0.2)
    return model, theirs


def assert_parity(model, theirs):
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    sites = sites_of(model)
    assert sites.keys() == layers.keys()
    for name, layer in layers.items():
        with torch.no_grad():
            sites[name].lora_a.copy_(layer.lora_A["default"].weight)
            sites[name].lora_b.copy_(layer.lora_B["default"].weight)
        assert sites[name].scale == layer.scaling["default"]
    (out, loss), (wanted, their_loss) = loss_of(model.train()), loss_of(theirs.train())
    loss.backward()
    their_loss.backward()
    assert torch.allclose(out, wanted, atol=1e-5)
    ours, expected = {}, {}
    for name, layer in layers.items():
        ours[f"{name}.a"], ours[f"{name}.b"] = sites[name].lora_a.grad, sites[name].lora_b.grad
        expected[f"{name}.a"] = layer.lora_A["default"].weight.grad
        expected[f"{name}.b"] = layer.lora_B["default"].weight.grad
    assert_close(ours, expected)


CASES = [
    ("llama", "all-linear", {}),
    ("llama", ["q_proj", "v_proj"], {}),
    ("llama", r".*\.1\..*(up|down)_proj", {}),
    ("llama", ["self_attn.q_proj", "down_proj"], {"layers": [1]}),
    ("llama", "all-linear", {"patterns": {"layers.0.*.q_proj": dict(r=7, alpha=3),
                                          "down_proj": dict(r=2), "k_proj": dict(alpha=9)}}),
    ("neox", "all-linear", {}),
    ("neox", ["query_key_value", "dense"], {}),
    ("own", ["up", "gate", "down"], {}),
    ("own", r"blocks\.[02]\.(up|down)|head", {"patterns": {r"blocks\.0\.up": dict(r=3)}}),
    ("gpt2", ["c_attn", "mlp.c_fc"], {}),
    ("bert", "all-linear", {}),
]  # fmt: skip


@pytest.mark.parametrize("maker, targets, words", CASES, ids=[f"{m}-{t}" for m, t, _ in CASES])
def test_it_is_peft_s_lora(maker, targets, words):
    model, theirs = twins(maker, targets, **words)
    assert_parity(model, theirs)
    assert pelt_fast.explain(model).fallbacks == []


def test_all_linear_is_all_but_the_output_and_what_is_never_called(caplog):
    model = pelt_fast.inject(llama(), "lora", targets="all-linear", r=2)
    assert len(sites_of(model)) == 14 and "lm_head" not in sites_of(model)
    own = pelt_fast.inject(Own(), "lora", targets="ALL-linear", r=2)
    kinds = ("up", "gate", "down")
    expected = {f"blocks.{i}.{kind}" for i in range(3) for kind in kinds} | {"head"}
    assert sites_of(own).keys() == expected
    assert "no LoRA on mixer.out_proj: the MultiheadAttention around it" in caplog.text
    bert_sites = sites_of(pelt_fast.inject(bert(), "lora", targets="all-linear", r=2))
    assert "classifier" not in bert_sites and "bert.pooler.dense" in bert_sites


@pytest.mark.parametrize("maker", ["llama", "neox", "own", "gpt2"])
def test_the_life_of_a_method_by_name(maker, tmp_path):
    torch.manual_seed(1)
    # frozen: torch's MultiheadAttention computes otherwise where it trains
    base = MAKERS[maker]().requires_grad_(False)
    method = lora(3, 6, targets=r".*(q_proj|dense|up|down|down_proj|c_fc|c_proj)", dropout=0.0)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    plain, _ = loss_of(base.eval())
    model = randomise(pelt_fast.inject(copy.deepcopy(base), method))
    out, loss = loss_of(model.eval())
    loss.backward()
    assert gradients(model).keys() == {n for n in model.state_dict() if "pelt_" in n}
    count = pelt_fast.count_parameters(model)
    assert count.trainable == count.kept == sum(g.numel() for g in gradients(model).values())
    pelt_fast.save(model, tmp_path)
    other = pelt_fast.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(loss_of(other.eval())[0], out)
    with pelt_fast.disabled(model):
        assert torch.equal(loss_of(model)[0], plain)
    twin = copy.deepcopy(model)
    assert torch.equal(loss_of(twin)[0], out)
    merged, _ = loss_of(pelt_fast.merge(model))
    assert torch.allclose(merged, out, atol=1e-4) and not torch.allclose(merged, plain, atol=1e-2)
    assert torch.equal(loss_of(pelt_fast.unmerge(model))[0], out)
    now = pelt_fast.eject(model).state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[n], t) for n, t in before.items())
    assert torch.equal(loss_of(model)[0], plain)


def test_patterns_are_saved_and_exported(tmp_path):
    patterns = {r"layers\.0\..*_proj": dict(r=5), r"layers\.1\..*_proj": dict(r=2, alpha=8)}
    model = randomise(pelt_fast.inject(llama(), lora(4, targets="all-linear", patterns=patterns)))
    out, _ = loss_of(model.eval())
    base = pelt_fast.eject(copy.deepcopy(model))
    pelt_fast.save(model, tmp_path / "ours")
    again = pelt_fast.load(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(loss_of(again.eval())[0], out)
    assert again._pelt.config == model._pelt.config
    pelt_fast.export_peft(model, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    assert torch.allclose(loss_of(theirs.eval())[0], out, atol=1e-5)


@pytest.mark.parametrize("maker", ["neox", "own"])
def test_peft_s_files_for_a_model_without_a_row(maker, tmp_path):
    names = ["dense_h_to_4h", "query_key_value"] if maker == "neox" else ["up", "down", "head"]
    base = MAKERS[maker]().requires_grad_(False)
    config = peft.LoraConfig(
        r=4, target_modules=names, rank_pattern={names[0]: 2}, init_lora_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = pelt_fast.load_peft(copy.deepcopy(base), tmp_path).eval()
    assert torch.allclose(loss_of(ours)[0], loss_of(theirs)[0], atol=1e-5)
    pelt_fast.save(ours, tmp_path / "ours")
    again = pelt_fast.load(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(loss_of(again)[0], loss_of(ours)[0])


def test_names_and_the_paper_s_places_stand_together():
    method = lora(2, targets=["lm_head"]) + lora(3, targets="q,v") + pelt_fast.prefix(2)
    model = pelt_fast.inject(llama(), method)
    assert len([site for site in model._pelt.sites if site.op == "lora"]) == 5
    # a pattern is for the paper's places, too
    model = pelt_fast.inject(llama(), lora(2, targets="q,v", patterns={"0.*q_proj": dict(r=6)}))
    assert [m.lora_a.shape[0] for m in sites_of(model).values()] == [6, 2, 2, 2]


def test_what_other_formats_and_sums_cannot_hold_is_refused(tmp_path):
    patterns = {"0.*query": dict(r=3)}
    for method in (lora(2, targets=["query"]), lora(2, targets="q,v", patterns=patterns)):
        model = pelt_fast.inject(bert(), method)
        with pytest.raises(ValueError, match="no LoRA by name and no patterns"):
            pelt_fast.export_adapterhub(model, tmp_path)
    pelt_fast.eject(model)
    pelt_fast.inject_named(model, {"a": "lora", "b": method})
    with pytest.raises(ValueError, match="'b' has patterns"):
        pelt_fast.set_active(model, {"a": 0.5, "b": 0.5})


def test_a_recipe_names_modules(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "extends: sst2\nsizes: {}\nmethod:\n  preset: lora\n  r: 4\n  targets: [query, value]\n"
        "  patterns: {layer.0.*query: {r: 2}}\n"
    )
    recipe = recipes.load(str(file))
    wanted = lora(4, targets=["query", "value"], patterns={"layer.0.*query": dict(r=2)})
    assert recipe.config().modifications == wanted.modifications
    again = recipe.reworded(dict(dropout=0)).config().modifications
    assert again == lora(4, targets=["query", "value"], dropout=0,
                         patterns={"layer.0.*query": dict(r=2)}).modifications  # fmt: skip


def test_named_methods_by_name():
    model = llama().eval()
    methods = {"a": lora(2, targets=["q_proj"]), "b": lora(3, targets=["q_proj"])}
    pelt_fast.inject_named(model, methods)
    pelt_fast.set_active(model, {"a": 0.5, "b": 0.5})
    assert {m.lora_a.shape[0] for m in sites_of(model).values()} == {5}


def test_a_text_says_what_it_names():
    assert [t["target"] for t in targets_of("q, ffn.in")] == ["attention.q", "ffn.in"]
    assert targets_of(["q", "attention.q"]) == [dict(target="attention.q", modules=None)]
    for given, modules in (
        ("All-Linear", "all-linear"), ("q_proj,v_proj", ("q_proj", "v_proj")),
        (["query"], ("query",)), (["q", "wi"], ("q", "wi")), (r".*q_proj", r".*q_proj"),
    ):  # fmt: skip
        assert targets_of(given) == [dict(target="modules", modules=modules)]
    m = Modification("low_rank", "modules", size=2)
    assert m.modules == "all-linear"
    config = lora(targets=["a", "b"], patterns={"a": dict(r=3)}, layers=[2, 1])
    assert PeltConfig.from_json(config.to_json()) == config
    assert "modules" not in lora().to_json() and "patterns" not in lora().to_json()


def test_words_say_names_and_patterns():
    preset = pelt_fast.methods()["lora"]
    words = parsed(["targets=q_proj,v_proj", 'patterns={"q_proj": {"r": 4}}', "r=2", "alpha=8"])
    found = changed(preset, words).modifications
    assert (
        found == lora(2, 8, targets="q_proj,v_proj", patterns={"q_proj": dict(r=4)}).modifications
    )
    assert found[0].patterns == (("q_proj", 4, 2.0),)
    assert changed(preset, dict(targets="all-linear")).modifications[0].modules == "all-linear"
    places = changed(changed(preset, dict(targets=["x"])), dict(targets="q,v"))
    assert places.modifications == preset.modifications
    with pytest.raises(ValueError, match="patterns must be JSON"):
        parsed(["patterns=q_proj"])


# model, the words of inject, what the message says
REFUSED = [
    ("llama", dict(targets=["q_prj"]), "no module 'q_prj'; did you mean 'q_proj'"),
    ("llama", dict(targets=["q_proj", "mlp.ups_proj"]), "did you mean 'mlp.up_proj'"),
    ("llama", dict(targets=["zzz"]), "its linear layers end in q_proj, k_proj, v_proj, o_proj"),
    ("llama", dict(targets=r"layers.*q_proj"), "no linear layer 'layers.*q_proj': its linear"),
    ("llama", dict(targets="("), r"'\(' is no regular expression"),
    ("llama", dict(targets=[]), "at least one of q, k, v"),
    ("llama", dict(targets="query"), r"a list of module names, as \['query'\]"),
    ("llama", dict(targets=["self_attn"]), "self_attn is a LlamaAttention: LoRA needs a linear"),
    ("llama", dict(targets=["embed_tokens"]), "embed_tokens is a Embedding: .* it looks rows up"),
    ("own", dict(targets=["patch"]), "patch is a Conv2d: .* a convolution is no product"),
    ("own", dict(targets=["mixer"]), "mixer is a MultiheadAttention: .* reads its weights itself"),
    ("own", dict(targets=["out_proj"]), "MultiheadAttention around it reads its weight"),
    ("bert", dict(targets=["classifier"]), "classifier is in the task head, which trains whole"),
    ("llama", dict(targets=["q_proj"], layers=[1, 2]), "no layer 2: .* in the layers 0 to 1"),
    ("llama", dict(targets="q,v", layers=[2]), "there is no layer 2"),
    ("own", dict(targets=["head"], layers=[0]), "no layer 0: .* in no numbered layer"),
    ("llama", dict(targets=["q_proj"], where=["decoder"]), "where is for targets of the paper"),
    (
        "llama",
        dict(targets=["q_proj"], patterns={"v_proj": dict(r=2)}),
        "pattern 'v_proj' is on no target of this LoRA",
    ),
    (
        "llama",
        dict(targets="q,v", patterns={"q_prj": dict(r=2)}),
        "pattern 'q_prj' is on no target .*did you mean 'q_proj'",
    ),
    (
        "llama",
        dict(targets="q,v", patterns={"q_proj": dict(r=2), "layers.1.*": dict(r=3)}),
        "patterns 'q_proj' and 'layers.1.*' are both on layers.1.self_attn.q_proj",
    ),
    ("llama", dict(patterns={"q_proj": dict(rank=2)}), r"patterns\['q_proj'\] must be dict\(r="),
    ("llama", dict(patterns={"q_proj": dict(r="2")}), "'q_proj'.: r must be an integer >= 1"),
    ("llama", dict(patterns={"q[": dict(r=2)}), "'q.' is no regular expression"),
    ("llama", dict(r=True), "r must be an integer >= 1, got True"),
    ("llama", dict(alpha=float("nan")), "alpha must be a finite number, got nan"),
    ("own", dict(), "model must be a transformers model"),
]


@pytest.mark.parametrize("maker, words, message", REFUSED, ids=[m for *_, m in REFUSED])
def test_what_is_wrong_is_named_and_nothing_is_changed(maker, words, message):
    model = MAKERS[maker]()
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    forwards = [module for module in model.modules() if "forward" in module.__dict__]
    with pytest.raises((ValueError, TypeError), match=message):
        pelt_fast.inject(model, "lora", **words)
    assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == before
    assert all(p.requires_grad for p in model.parameters())
    assert forwards == [module for module in model.modules() if "forward" in module.__dict__]


class Reader(nn.Module):
    """Calls one of its layers, and reads the weight of the other."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight)


def test_a_layer_that_never_runs_is_said_once(caplog):
    model = pelt_fast.inject(Reader(), "lora", targets="all-linear", r=2)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        caplog.clear()
        each(torch.randn(2, 8))
        assert "1 of the layers by name did not run in the first forward: read." in caplog.text
        caplog.clear()
        each(torch.randn(2, 8))
        assert caplog.text == ""
        hooks = [module for module in each.modules() if module._forward_hooks]
        assert hooks == []
        pelt_fast.eject(each)
    pelt_fast.inject(llama(), "lora", targets="all-linear", r=2)(**inputs(llama()))
    assert caplog.text == ""
    model = pelt_fast.eject(pelt_fast.inject(Reader(), "lora", targets=["read"], r=2))
    assert all(not module._forward_hooks for module in model.modules())


def test_a_layer_that_torch_reads_itself_is_no_target(caplog):
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 4))
    for name in ("linear1", "self_attn.out_proj"):
        with pytest.raises(ValueError, match="around it reads its weight without calling it"):
            pelt_fast.inject(model, "lora", targets=[name])
    assert sites_of(pelt_fast.inject(model, "lora", targets="all-linear", r=2)).keys() == {"1"}
    assert "no LoRA on 0.linear2: the TransformerEncoderLayer around it" in caplog.text


def test_a_compiled_model_by_name():
    torch._dynamo.reset()
    model = randomise(pelt_fast.inject(Reader(), "lora", targets=["called"], r=2, dropout=0))
    x = torch.randn(3, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_two_targets_on_one_layer_are_named():
    for other, message in (
        (lora(3, targets="all-linear"), "two LoRA of other size"),
        (lora(2, targets=["self_attn.q_proj"]), "is a target twice"),
    ):
        with pytest.raises(ValueError, match=message):
            pelt_fast.inject(llama(), lora(2, targets=["q_proj"]) + other)
    with pytest.raises(ValueError, match="c_attn:q is a part of a layer that has a LoRA"):
        pelt_fast.inject(gpt2(), lora(2, targets="q") + lora(2, targets=["c_attn"]))


def test_wrong_types_are_named():
    for make, error, message in (
        (lambda: lora(targets=[3]), TypeError, "targets must hold names, got int"),
        (lambda: lora(patterns=["q"]), TypeError, "patterns must be a dict, got list"),
        (lambda: lora(r="8"), ValueError, "r must be an integer >= 1, got '8'"),
        (lambda: Modification("low_rank", "ffn.in", size=2, modules=("a",)), ValueError,
         "modules is for the target 'modules'"),
        (lambda: Modification("prefix", "heads", size=2, composition="gated",
                              patterns=(("a", 2, 1.0),)), ValueError, "patterns is for low_rank"),
        (lambda: Modification("low_rank", "modules", size=2, modules=(3,)), ValueError,
         "modules must hold names"),
        (lambda: Modification("low_rank", "modules", size=2, patterns=(("a", 0, 1.0),)), ValueError,
         "size must be an integer >= 1"),
        (lambda: Modification("bottleneck", "modules", size=2), ValueError, "has no meaning"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            make()


def test_t5_s_own_names():
    """In T5 q and v are names of modules as well: the paper's places."""
    places = pelt_fast.inject(t5(), "lora", r=2, targets=["q", "v"])
    names = pelt_fast.inject(t5(), "lora", r=2, targets=r".*\.(q|v)")
    assert {f"{n}" for n in sites_of(places)} == {f"{n}" for n in sites_of(names)}
    batch = inputs(names)
    names(**batch).loss.backward()
    assert len(gradients(names)) == 2 * len(sites_of(names))
