"""AdapterHub's files: read from fixtures laid out as adapters 1.x documents, written and read back;
and, where PELT_FAST_ADAPTERS_PYTHON names an interpreter that has it, against ``adapters`` itself.
"""

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import pelt_fast
from tests.models.judge import assert_near, assert_untouched, exactly, state
from tests.models.test_parity import small_method
from tests.small import MODELS, MORE, inputs, randomise

BN = dict(
    mh_adapter=False, output_adapter=True, reduction_factor=4, non_linearity="relu",
    original_ln_before=False, original_ln_after=True, ln_before=False, ln_after=False,
    init_weights="mam_adapter", is_parallel=True, scaling=4.0, use_gating=False,
    residual_before_ln=True, adapter_residual_before_ln=False, dropout=0.0, phm_layer=False,
    leave_out=[], inv_adapter=None, stochastic_depth=0.0,
)  # fmt: skip
PREFIX = dict(architecture="prefix_tuning", encoder_prefix=True, cross_prefix=True, flat=True,
              prefix_length=3, bottleneck_size=8, non_linearity="tanh", dropout=0.0,
              use_gating=False, leave_out=[])  # fmt: skip
LORA = dict(architecture="lora", selfattn_lora=True, intermediate_lora=False, output_lora=False,
            attn_matrices=["q"], r=5, alpha=10, dropout=0.0, composition_mode="add",
            use_gating=False, use_dora=False, leave_out=[])  # fmt: skip


def fixture(folder: Path, config: dict, tensors: dict, name="mine") -> Path:
    about = dict(config=config, hidden_size=32, model_type="bert", name=name, version="adapters.1")
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(about))
    torch.save(tensors, folder / "pytorch_adapter.bin")
    return folder


def bottleneck(place: str, size: int = 8) -> dict:
    return {
        f"{place}.adapter_down.0.weight": torch.randn(size, 32),
        f"{place}.adapter_down.0.bias": torch.randn(size),
        f"{place}.adapter_up.weight": torch.randn(32, size),
        f"{place}.adapter_up.bias": torch.randn(32),
    }


def hooked(plain, modules: dict, dtype, scale: float, sequential: bool):
    """The plain model with a hook on each module that adds what the fixture's tensors say."""
    twin = copy.deepcopy(plain).to(dtype)
    for path, tensors in modules.items():
        down, down_bias, up, up_bias = (t.to(dtype) for t in tensors.values())

        def add(module, args, output, d=down, b=down_bias, u=up, c=up_bias):
            x = output if sequential else args[0]
            act = torch.nn.functional.silu if sequential else torch.relu
            return output + scale * (act(x @ d.T + b) @ u.T + c)

        twin.get_submodule(path).register_forward_hook(add)
    return twin


def assert_is(model, twins, batch):
    same, exact = twins
    with torch.no_grad():
        wanted = [t(**batch).logits for t in (same, exact)]
        assert_near(model.eval()(**batch).logits, *wanted)


def test_parallel_bottlenecks_of_a_decoder(tmp_path):
    torch.manual_seed(0)
    plain = MODELS["llama"](dropout=0.0).eval()
    places = {i: f"model.layers.{i}.output_adapters.adapters.mine" for i in range(2)}
    found = {i: bottleneck(place) for i, place in places.items()}
    folder = fixture(tmp_path, BN, found[0] | found[1])
    model = pelt_fast.load_adapterhub(copy.deepcopy(plain), folder)

    def twin(dtype):
        # it reads the stream in front of the norm and is added behind the block
        twin = copy.deepcopy(plain).to(dtype)
        for i, layer in enumerate(twin.model.layers):
            down, down_bias, up, up_bias = (t.to(dtype) for t in found[i].values())
            seen = {}
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda module, args, seen=seen: seen.update(x=args[0])
            )

            def add(module, args, output, seen=seen, d=down, b=down_bias, u=up, c=up_bias):
                return output + 4.0 * (torch.relu(seen["x"] @ d.T + b) @ u.T + c)

            layer.mlp.register_forward_hook(add)
        return twin

    assert_is(model, (twin(torch.float32), twin(torch.float64)), inputs(plain))


def test_houlsby_bottlenecks_of_an_encoder(tmp_path):
    torch.manual_seed(0)
    plain = MODELS["bert"](dropout=0.0).eval()
    modules, tensors = {}, {}
    for i in range(2):
        for place in ("attention.output", "output"):
            found = bottleneck(f"bert.encoder.layer.{i}.{place}.adapters.mine")
            modules[f"bert.encoder.layer.{i}.{place}.dense"] = found
            tensors |= found
    config = BN | dict(mh_adapter=True, is_parallel=False, scaling=1.0, non_linearity="swish")
    model = pelt_fast.load_adapterhub(copy.deepcopy(plain), fixture(tmp_path, config, tensors))
    twins = [hooked(plain, modules, dtype, 1.0, True) for dtype in (torch.float32, torch.float64)]
    assert_is(model, twins, inputs(plain, padding="right"))


@pytest.mark.parametrize("leave_out", [[], [0, 3]])
@pytest.mark.parametrize("architecture", ["t5", "t5, gated", "mt5"])
def test_bottlenecks_of_t5_are_its_sublayers_and_left_out_layers_have_none(
    architecture, leave_out, tmp_path
):
    torch.manual_seed(0)
    plain = MORE[architecture](dropout=0.0).eval()
    places = {0: ("SelfAttention.o", "DenseReluDense.wo"),
              1: ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")}  # fmt: skip
    modules, tensors = {}, {}
    for layer in {0, 1, 2, 3} - set(leave_out):
        decoder, index = divmod(layer, 2)
        block = f"{('encoder', 'decoder')[decoder]}.block.{index}"
        for i, out in enumerate(places[decoder]):
            found = bottleneck(f"{block}.layer.{i}.adapters.mine")
            modules[f"{block}.layer.{i}.{out}"] = found
            tensors |= found
    config = BN | dict(mh_adapter=True, cross_adapter=True, is_parallel=False, scaling=1.0,
                       non_linearity="swish", leave_out=leave_out)  # fmt: skip
    model = pelt_fast.load_adapterhub(copy.deepcopy(plain), fixture(tmp_path, config, tensors))
    twins = [hooked(plain, modules, dtype, 1.0, True) for dtype in (torch.float32, torch.float64)]
    assert_is(model, twins, inputs(plain))


@pytest.mark.parametrize("architecture, config, message", [
    ("t5", PREFIX, "position bias counts AdapterHub's prefix"),
    ("mt5", PREFIX, "position bias counts AdapterHub's prefix"),
    ("gpt2", BN, "bottleneck is not read for 'gpt2'"),
    ("qwen2", LORA, "lora is not read for 'qwen2'"),
])  # fmt: skip
def test_what_was_never_compared_is_refused(architecture, config, message, tmp_path):
    plain = MORE[architecture]()
    before = state(plain)
    with pytest.raises(ValueError, match=message):
        pelt_fast.load_adapterhub(plain, fixture(tmp_path, config, {"strange.key": torch.ones(1)}))
    assert_untouched(plain, before)


def test_a_tensor_without_a_place_is_refused_by_name(tmp_path):
    plain = MODELS["llama"]()
    tensors = {}
    for i in range(2):
        tensors |= bottleneck(f"model.layers.{i}.output_adapters.adapters.mine")
    before = state(plain)
    extra = "model.layers.0.output_adapters.adapters.mine.gate.weight"
    with pytest.raises(ValueError, match=extra):
        pelt_fast.load_adapterhub(plain, fixture(tmp_path, BN, tensors | {extra: torch.ones(1)}))
    assert_untouched(plain, before)


@pytest.mark.parametrize("head", [
    {"classifier.weight": torch.ones(2, 32)},
    {"heads.mine.1.weight": torch.ones(3, 32)},
])  # fmt: skip
def test_a_head_that_is_not_the_model_s_is_refused_or_left_out(head, tmp_path):
    plain = MODELS["bert"]()
    query = "bert.encoder.layer.{}.attention.self.query.loras.mine.lora_{}"
    tensors = {query.format(i, "A"): torch.randn(5, 32) for i in range(2)}
    tensors |= {query.format(i, "B"): torch.randn(32, 5) for i in range(2)}
    folder, before = fixture(tmp_path, LORA, tensors), state(plain)
    torch.save(head, folder / "pytorch_model_head.bin")
    with pytest.raises(ValueError, match="head=False reads the adapter without it"):
        pelt_fast.load_adapterhub(plain, folder)
    assert_untouched(plain, before)
    model = pelt_fast.load_adapterhub(plain, folder, head=False)
    assert pelt_fast.count_parameters(model).head == 0


def test_a_flat_prefix_lies_by_token_layer_key_or_value_head(tmp_path):
    torch.manual_seed(0)
    plain = MODELS["bart"](dropout=0.0).eval()
    flat = {part: torch.randn(3 * 2 * 2 * 32) for part in ("encoder", "self", "cross")}
    tensors = {
        f"model.prefix_tuning.prefix_tunings.mine.{part}_prefix.control_trans": value
        for part, value in flat.items()
    }
    model = pelt_fast.load_adapterhub(plain, fixture(tmp_path, PREFIX, tensors))
    banks = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for part, name in (("encoder", "encoder"), ("self", "decoder"), ("cross", "cross")):
        (bank,) = (p for n, p in banks.items() if n.endswith(f"pelt_{name}_prefix.prefix"))
        by_token = flat[part].view(3, 4, 4, 8)  # token, layer and key or value, head, dim
        for layer in range(2):
            for which in range(2):
                wanted = by_token[:, 2 * layer + which].transpose(0, 1)
                assert torch.equal(bank[layer, which], wanted)


def test_lora_and_the_head_beside_it(tmp_path):
    torch.manual_seed(0)
    plain = MODELS["bert"](dropout=0.0).eval()
    tensors, twin = {}, copy.deepcopy(plain).double()
    for i in range(2):
        query = f"bert.encoder.layer.{i}.attention.self.query"
        a, b = torch.randn(5, 32), torch.randn(32, 5)
        tensors |= {f"{query}.loras.mine.lora_A": a, f"{query}.loras.mine.lora_B": b}
        twin.get_submodule(query).weight.data += 2.0 * b.double() @ a.double()
    head = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    twin.classifier.load_state_dict({k.split(".")[1]: v for k, v in head.items()})
    folder = fixture(tmp_path, LORA, tensors)
    torch.save(head, folder / "pytorch_model_head.bin")
    model = pelt_fast.load_adapterhub(copy.deepcopy(plain), folder)
    assert_is(model, (copy.deepcopy(twin).float(), twin), inputs(plain, padding="right"))


WRITTEN = ["lora", "houlsby", "scaled_parallel_adapter", "learned_scale_parallel_adapter",
           "prefix", "mam"]  # fmt: skip


def writable(method: str):
    """The preset where AdapterHub's format has it: Houlsby's without the paper code's LayerNorm and
    behind self-attention alone."""
    config = small_method(method)
    if method != "houlsby":
        return config.replace(dropout=0.0, size=8)
    return config.replace(dropout=0.0, size=8, layer_norm="none", where=("encoder", "decoder"))


@pytest.mark.parametrize("method", WRITTEN)
@pytest.mark.parametrize("architecture", ["bert", "bart", "roberta"])
def test_there_and_back(architecture, method, tmp_path):
    torch.manual_seed(0)
    plain = MODELS[architecture](dropout=0.0).eval()
    ours = randomise(pelt_fast.inject(copy.deepcopy(plain), writable(method))).eval()
    pelt_fast.export_adapterhub(ours, tmp_path, "mine")
    again = copy.deepcopy(plain)
    for name, child in again.named_children():  # the head is not a part of an adapter's files
        if name == "classifier":
            child.load_state_dict(getattr(ours, name).state_dict())
    pelt_fast.load_adapterhub(again, tmp_path).eval()
    batch = inputs(ours, padding="right")
    exact = exactly(ours, batch)["logits"]
    with torch.no_grad():
        assert_near(again(**batch).logits, ours(**batch).logits, exact)


@pytest.mark.parametrize("config, message", [
    (BN | dict(is_parallel=False, original_ln_before=True), "keeps a residual from in front"),
    (BN | dict(use_gating=True), "use_gating=True of AdapterHub has no place"),
    (BN | dict(phm_layer=True), "phm_layer=True"),
    (BN | dict(leave_out=[9]), r"leave_out=\[9\], the model has 2 layers"),
    (BN | dict(dropout=0.1), "dropout=0.1"),
    (dict(architecture="prompt_tuning"), "holds prompt_tuning"),
    (BN | dict(reduction_factor=32), "there is no place for strange.key"),
    (BN | dict(new_key=3), "new_key=3 of AdapterHub has no place"),
    (BN | dict(inv_adapter="nice"), "inv_adapter=nice"),
    (BN | dict(stochastic_depth=0.5), "stochastic_depth=0.5"),
    (BN | dict(original_ln_after=False), "original_ln_after=False"),
    (BN | dict(residual_before_ln="post_add"), "residual_before_ln=post_add"),
    (BN | dict(mh_adapter=True), "mh_adapter=True"),
    (BN | dict(cross_adapter=True), "cross_adapter=True"),
    (BN | dict(ln_after=True, adapter_residual_before_ln=True), "adapter_residual_before_ln"),
    (BN | dict(ln_before=True, ln_after=True), "one LayerNorm here, not two"),
    (BN | dict(reduction_factor={"default": 4}), "reduction_factor="),
    (BN | dict(non_linearity="leakyrelu"), "non_linearity=leakyrelu"),
    (LORA | dict(use_dora=True), "use_dora=True"),
    (LORA | dict(composition_mode="scale", init_weights="ia3"), "composition_mode=scale"),
    (LORA | dict(init_weights="vera", vera_d=0.1, vera_b=0.0), "vera_d=0.1"),
    (LORA, "r=5, the factors are of rank 0"),
    (LORA | dict(architecture="mtl_lora"), "holds mtl_lora"),
    (dict(architecture="reft"), "holds reft"),
    (dict(architecture="union", configs=[BN], shared=True), "shared=True"),
    (dict(architecture="union", configs=[BN | dict(use_gating=True)]), "use_gating=True"),
    (PREFIX | dict(dropout=0.1), "dropout=0.1"),
    (PREFIX | dict(use_gating=True), "use_gating=True"),
    (BN | dict(reduction_factor=1e-12), "the weights hold none"),
    (BN | dict(reduction_factor=0), "is none of adapters 1.x"),
    (PREFIX | dict(prefix_length=2**60), "the weights hold none"),
    ({"architecture": "prefix_tuning"}, "is none of adapters 1.x"),
])  # fmt: skip
def test_what_has_no_place_here_is_refused_and_nothing_changed(config, message, tmp_path):
    plain = MODELS["bert"]()
    folder = fixture(tmp_path, config, {"strange.key": torch.ones(1)})
    before = state(plain)
    with pytest.raises(ValueError, match=message):
        pelt_fast.load_adapterhub(plain, folder)
    assert_untouched(plain, before)


@pytest.mark.parametrize("method, architecture, message", [
    ("prefix_ungated", "bart", "ungated"),
    ("prompt", "bart", "no place for 'prompt'"),
    ("multi_head_parallel_adapter", "bart", "not these"),
    ("pfeiffer", "bart", "not these"),
    ("parallel_adapter_attn", "bart", "not these"),
    ("prefix", "t5", "prefix_tuning is not written for 't5'"),
    ("lora", "gpt2", "lora is not written for 'gpt2'"),
    ("lora_ffn", "llama", "on one matrix of a gated FFN"),
])  # fmt: skip
def test_what_the_format_has_no_place_for_is_not_written(method, architecture, message, tmp_path):
    model = pelt_fast.inject({**MODELS, **MORE}[architecture](), small_method(method))
    with pytest.raises(ValueError, match=message):
        pelt_fast.export_adapterhub(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("changes, message", [
    (dict(layers=(1,)), "on every layer alone"),
    (dict(where=("cross", "encoder")), "always on a decoder"),
])  # fmt: skip
def test_a_prefix_the_format_has_no_place_for_is_not_written(changes, message, tmp_path):
    model = pelt_fast.inject(MODELS["bart"](), small_method("prefix", **changes))
    with pytest.raises(ValueError, match=message):
        pelt_fast.export_adapterhub(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


PEER = os.environ.get("PELT_FAST_ADAPTERS_PYTHON")


def result(model, given: dict) -> torch.Tensor:
    """As the peer's."""
    with torch.no_grad():
        out = model(**given, output_hidden_states=model.config.model_type == "mt5")
    return out.decoder_hidden_states[-1] if model.config.model_type == "mt5" else out.logits


def exact_result(model, given: dict) -> torch.Tensor:
    with pelt_fast.backend("reference"):
        return result(copy.deepcopy(model).double(), given)


def made(architecture: str):
    changes = dict(num_key_value_heads=4) if architecture in ("llama", "mistral") else {}
    changes |= dict(sliding_window=None) if architecture == "mistral" else {}
    return {**MODELS, **MORE}[architecture](**changes)


@pytest.mark.skipif(not PEER, reason="PELT_FAST_ADAPTERS_PYTHON names no Python with adapters")
def test_adapters_itself_both_ways(tmp_path):
    script = str(Path(__file__).with_name("adapterhub_peer.py"))
    subprocess.run([PEER, script, "write", str(tmp_path / "theirs")], check=True)
    for place in sorted((tmp_path / "theirs").iterdir()):
        out, model = torch.load(place / "out.pt"), made(place.name.split(",")[0]).eval()
        mt5 = model.config.model_type == "mt5"
        if mt5:  # tied to its embeddings since transformers 5
            del out["base"]["lm_head.weight"]
        model.load_state_dict(out["base"], strict=False)
        pelt_fast.load_adapterhub(model, place, head=not mt5).eval()
        given = out["given"]
        assert_near(out["result"], result(model, given), exact_result(model, given))
        if "left_out" in place.name:
            continue
        randomise(model)  # the head, too
        ours = tmp_path / "ours" / place.name
        pelt_fast.export_adapterhub(model, ours, place.name)
        same, exact = result(model, given), exact_result(model, given)
        torch.save(out | dict(result=same, exact=exact), ours / "out.pt")
    subprocess.run([PEER, script, "read", str(tmp_path / "ours")], check=True)
    read = sorted((tmp_path / "ours").glob("*/theirs.pt"))
    assert len(read) == 66
    for place in read:
        out = torch.load(place.with_name("out.pt"))
        assert_near(torch.load(place), out["result"], out["exact"])
