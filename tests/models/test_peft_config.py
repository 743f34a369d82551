"""What PEFT's config may say: each option is what PEFT itself reloads to, or refused by name with
the model untouched."""

import copy
import dataclasses
import json
import random

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig

import pelt_fast
from pelt_fast.formats.peft_config import HARMLESS, READ, VARIANTS, scale_of
from tests.models.judge import assert_near, assert_untouched, exactly, state
from tests.small import MODELS, MORE, inputs, randomise

ALL = {**MODELS, **MORE}
CONFIGS = {"LORA": LoraConfig, "PREFIX_TUNING": PrefixTuningConfig,
           "PROMPT_TUNING": PromptTuningConfig}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_key_this_peft_has_is_known(kind):
    keys = {field.name for field in dataclasses.fields(CONFIGS[kind])}
    known = {"peft_type", "modules_to_save", *READ[kind], *HARMLESS[kind]}
    assert keys <= known | (VARIANTS.keys() if kind == "LORA" else set())


def trained(plain, config) -> peft.PeftModel:
    return randomise(peft.get_peft_model(copy.deepcopy(plain), config), 0.1)


def assert_peft_s_reload(plain, folder, **given):
    """Ours is as near to its own fp64 as PEFT's reload is; eject gives the base back."""
    before = state(plain)
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()
    ours = pelt_fast.load_peft(copy.deepcopy(plain), folder).eval()
    batch = inputs(plain, **given)
    exact = exactly(ours, batch)["logits"]
    with torch.no_grad():
        assert_near(theirs(**batch).logits, ours(**batch).logits, exact)
        changed = theirs(**batch).logits - plain(**batch).logits
    assert changed.abs().max() > 5e-5
    assert_untouched(pelt_fast.eject(ours), before)


ON_Q = dict(target_modules=["q_proj", "v_proj"])
RIGHT = [
    dict(use_rslora=True, lora_alpha=3),
    dict(rank_pattern={"0.*q_proj": 2}, alpha_pattern={"v_proj": 7}),
    dict(alpha_pattern={"layers.0.self_attn.q_proj": 64, "q_proj": 16}),
    dict(target_modules=r".*layers\.[01]\.self_attn\.(q|o)_proj"),
    dict(target_modules="all-linear"),
    dict(target_modules="all-linear", exclude_modules=["o_proj"]),
    dict(target_modules=["q_proj", "k_proj"], layers_to_transform=[1]),
    dict(target_modules=["down_proj"], layers_to_transform=0, layers_pattern="layers"),
    dict(target_modules=["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]),
    dict(fan_in_fan_out=True),
    dict(lora_dropout=0.3),
    *(dict(init_lora_weights=init)
      for init in (True, False, "gaussian", "orthogonal", "pissa", "olora", "mica")),
    dict(init_lora_weights="pissa", use_rslora=True, rank_pattern={"v_proj": 2}),
    dict(init_lora_weights="olora", alpha_pattern={"v_proj": 2}),
]  # fmt: skip


@pytest.mark.parametrize("changes", RIGHT, ids=str)
def test_an_option_of_lora_is_peft_s_reload(changes, tmp_path):
    torch.manual_seed(0)
    plain = MODELS["llama"](dropout=0.0).eval()
    trained(plain, LoraConfig(**(dict(r=4) | ON_Q | changes))).save_pretrained(tmp_path)
    assert_peft_s_reload(plain, tmp_path)


@pytest.mark.parametrize("architecture, changes", [
    ("roberta", dict(target_modules=["query", "value"], modules_to_save=["classifier"])),
    ("roberta", dict(target_modules=["query"], task_type="SEQ_CLS")),
    ("roberta", dict(target_modules=["query"], bias="all")),
    ("roberta", dict(target_modules=["dense"], exclude_modules=["dense", "classifier.dense"])),
    ("bart", dict(target_modules=["q_proj", "v_proj", "fc1"], use_rslora=True)),
    ("bart", dict(target_modules=["fc2", "out_proj"], layers_to_transform=[0], bias="all")),
    ("bart", dict(target_modules=r".*decoder.*encoder_attn\.(q|v)_proj")),
    ("t5", dict(target_modules=["q", "v", "wo"])),
    ("t5, gated", dict(target_modules=["wi_0", "wi_1"], rank_pattern={"wi_0": 2})),
    ("gpt2", dict(target_modules=["c_attn"])),
    ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    ("gpt2", dict(target_modules=["attn.c_proj"], layers_to_transform=[1])),
    ("gpt2", dict(target_modules=["c_attn", "c_proj"], init_lora_weights="pissa")),
    ("phi3", dict(target_modules=["qkv_proj", "gate_up_proj"], alpha_pattern={"qkv_proj": 3})),
    ("phi3", dict(target_modules=["qkv_proj", "o_proj"], init_lora_weights="olora")),
    ("modernbert", dict(target_modules=["Wqkv", "Wi", "Wo"])),
    ("deberta-v2", dict(target_modules=["query_proj", "value_proj"])),
    ("whisper", dict(target_modules=["q_proj", "v_proj"])),
    ("vit", dict(target_modules=["q_proj"], modules_to_save=["classifier"])),
], ids=str)  # fmt: skip
def test_lora_on_every_layout_is_peft_s_reload(architecture, changes, tmp_path):
    if "dense" in changes["target_modules"]:
        changes = changes | dict(exclude_modules=["classifier.dense"])
    torch.manual_seed(0)
    plain = ALL[architecture](dropout=0.0).eval()
    trained(plain, LoraConfig(**(dict(r=4) | changes))).save_pretrained(tmp_path)
    assert_peft_s_reload(plain, tmp_path)


def test_lora_of_a_converted_pissa_is_plain(tmp_path):
    torch.manual_seed(0)
    plain = MODELS["llama"](dropout=0.0).eval()
    config = LoraConfig(r=4, init_lora_weights="pissa", **ON_Q)
    theirs = peft.get_peft_model(copy.deepcopy(plain), config)
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it
    theirs.save_pretrained(tmp_path / "first")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    randomise(theirs, 0.1).save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "first")
    )
    assert json.loads((tmp_path / "converted" / "adapter_config.json").read_text())["r"] == 8
    assert_peft_s_reload(plain, tmp_path / "converted")


def test_patterns_choose_as_peft_does():
    random.seed(0)
    torch.manual_seed(0)
    plain = MODELS["llama"](dropout=0.0)
    names = [name for name, module in plain.named_modules() if name.endswith("_proj")]
    for _ in range(30):
        rslora = random.random() < 0.5
        rank, alpha = ({_pattern(names): random.randint(1, 9) for _ in range(4)} for _ in range(2))
        config = LoraConfig(r=4, lora_alpha=5, rank_pattern=rank, alpha_pattern=alpha,
                            use_rslora=rslora, target_modules="all-linear")  # fmt: skip
        theirs = peft.get_peft_model(copy.deepcopy(plain), config).base_model.model
        about = json.loads(json.dumps(dict(
            r=4, lora_alpha=5, rank_pattern=rank, alpha_pattern=alpha, use_rslora=rslora
        )))  # fmt: skip
        for name in names:
            layer = theirs.get_submodule(name)
            assert scale_of(about, name, layer.r["default"]) == layer.scaling["default"]


def _pattern(names: list[str]) -> str:
    """A regular expression somebody could write: a whole name, its end, digits, anchors, dots."""
    name = random.choice(names)
    end = ".".join(name.split(".")[-random.randint(1, 4) :])
    return random.choice([
        name, end, f"^{name}", end.replace(".", r"\."), f".*{end}", f"layers.[01].*{end[-6:]}",
        rf"{end[:-5]}\w+", f"^{end}", end[1:], rf".*\.\d\..*{end[-4:]}",
    ])  # fmt: skip


def test_random_patterns_give_peft_s_outputs(tmp_path):
    random.seed(1)
    torch.manual_seed(1)
    plain = MODELS["llama"](dropout=0.0).eval()
    names = [name for name, module in plain.named_modules() if name.endswith("_proj")]
    for i in range(4):
        rank, alpha = ({_pattern(names): random.randint(1, 9) for _ in range(4)} for _ in range(2))
        config = LoraConfig(r=4, lora_alpha=5, rank_pattern=rank, alpha_pattern=alpha,
                            target_modules="all-linear")  # fmt: skip
        trained(plain, config).save_pretrained(tmp_path / str(i))
        assert_peft_s_reload(plain, tmp_path / str(i))


def refused(plain, folder, message):
    before = state(plain)
    with pytest.raises(ValueError, match=message):
        pelt_fast.load_peft(plain, folder)
    assert_untouched(plain, before)


@pytest.mark.parametrize("changes, message", [
    (dict(use_dora=True), "is not plain LoRA: use_dora=True"),
    (dict(lora_bias=True, target_modules=["query"]), "lora_bias=True"),
    (dict(bias="lora_only"), "is not plain LoRA: bias='lora_only'"),
    (dict(init_lora_weights="pissa_niter_2"), "PEFT draws others .* convert the file"),
    (dict(alora_invocation_tokens=[4, 5]), r"alora_invocation_tokens=\[4, 5\]"),
    (dict(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    (dict(target_modules=[], target_parameters=["q_proj.weight"]), "target_parameters"),
    (dict(layer_replication=[(0, 2), (1, 2)]), "layer_replication"),
    (dict(target_modules=["lm_head"]), "has no place for LoRA on lm_head"),
    (dict(target_modules=["q_proj", "embed_tokens"]), "no LoRA on embeddings"),
    (dict(target_modules=["up_proj"]), "up_proj but not on .*gate_proj: ffn.in here is both"),
    (dict(modules_to_save=["embed_tokens"]), "embed_tokens.weight .* neither a factor nor of"),
    (dict(modules_to_save=["norm"]), "norm.weight .* neither a factor nor of"),
    (dict(modules_to_save=["lm_head"]), "lm_head.weight .* neither a factor nor of"),
], ids=str)  # fmt: skip
def test_what_is_no_method_here_is_refused_and_nothing_changed(changes, message, tmp_path):
    kind = "roberta" if "query" in changes.get("target_modules", ()) else "llama"
    plain = MODELS[kind](dropout=0.0)
    trained(plain, LoraConfig(**(dict(r=4) | ON_Q | changes))).save_pretrained(tmp_path)
    refused(plain, tmp_path, message)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A plain LoRA of PEFT's."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    plain = MODELS["llama"](dropout=0.0).eval()
    trained(plain, LoraConfig(r=4, **ON_Q)).save_pretrained(folder)
    return plain, folder


def edited(folder, to, **changes):
    about = json.loads((folder / "adapter_config.json").read_text()) | changes
    (to / "adapter_config.json").write_text(json.dumps(about))
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (to / "adapter_model.safetensors").write_bytes(weights)
    return to


@pytest.mark.parametrize("changes, message", [
    (dict(a_key_of_tomorrow=3), "a_key_of_tomorrow=3 .this pelt_fast does not know the key"),
    (dict(a_key_of_tomorrow=0), "a_key_of_tomorrow=0"),
    (dict(a_key_of_tomorrow={"x": None}), "a_key_of_tomorrow="),
    *(({key: True}, f"{key}=True") for key in VARIANTS),
    *((dict(init_lora_weights=init), f"init_lora_weights='{init}'")
      for init in ("corda", "loftq", "lora_ga", "pissa_niter_16", "of_tomorrow")),
    (dict(r=5), "of rank 4, the config says 5"),
    (dict(rank_pattern={"q_proj": 3}), "of rank 4, the config says 3"),
    (dict(rank_pattern={"(": 3}), "no regular expression"),
    (dict(rank_pattern=[3]), "rank_pattern must be an object"),
    (dict(alpha_pattern={"q_proj": "x"}), "must be a number, got 'x'"),
    (dict(lora_alpha=None), "lora_alpha must be a number"),
    (dict(lora_dropout=2.0), "dropout must be in"),
    (dict(use_rslora="yes"), "use_rslora must be true or false"),
    (dict(bias="some"), "bias='some'"),
    (dict(bias="all", modules_to_save=["norm"]), "modules_to_save names model.*norm.weight"),
    (dict(modules_to_save="norm"), "must be a list of names"),
    (dict(peft_type="P_TUNING"), "holds P_TUNING"),
    (dict(peft_type="ADALORA"), "holds ADALORA"),
    (dict(peft_type=["LORA"]), "holds .'LORA'."),
], ids=str)  # fmt: skip
def test_a_config_that_says_more_is_refused_by_name(changes, message, saved, tmp_path):
    plain, folder = saved
    refused(plain, edited(folder, tmp_path, **changes), message)


def test_a_key_that_says_nothing_changes_nothing(saved, tmp_path):
    plain, folder = saved
    said = {f"key_{i}": value for i, value in enumerate((None, False, "", [], {}))}
    harmless = dict(target_modules=["x"], layers_to_transform=[7], megatron_core="else",
                    peft_version="9.9", runtime_config={"ephemeral_gpu_offload": True})  # fmt: skip
    once = pelt_fast.load_peft(copy.deepcopy(plain), folder).state_dict()
    again = pelt_fast.load_peft(
        copy.deepcopy(plain), edited(folder, tmp_path, **said, **harmless)
    ).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in once.items())


@pytest.mark.parametrize("key, shape, message", [
    ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", (32,), "lora_magnitude_vector"),
    ("model.layers.0.self_attn.q_proj.lora_B.bias", (32,), "lora_B.bias"),
    ("model.embed_tokens.lora_embedding_A", (4, 61), "no LoRA on embeddings"),
    ("model.norm.weight", (32,), "norm.weight .* neither"),
    ("model.layers.7.self_attn.q_proj.lora_A.weight", (4, 32), "no pair of factors for .*layers.7"),
    ("model.layers.0.self_attn.q_proj.lora_A.weight", (4, 31), "do not fit .*layers.0"),
    ("model.layers.0.self_attn.q_proj.lora_A.weight", (4,), "are no matrices"),
], ids=str)  # fmt: skip
def test_a_tensor_without_a_place_is_refused_by_name(key, shape, message, saved, tmp_path):
    plain, folder = saved
    tensors = torch.load(_as_bin(folder, tmp_path))
    torch.save(tensors | {f"base_model.model.{key}": torch.ones(shape)}, tmp_path / WEIGHTS)
    refused(plain, tmp_path, message)


WEIGHTS = "adapter_model.bin"


def _as_bin(folder, to):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "adapter_model.safetensors"), to / WEIGHTS)
    (to / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    return to / WEIGHTS


@pytest.mark.parametrize("changes, message", [
    (dict(num_virtual_tokens=4), "num_virtual_tokens says 4"),
    (dict(num_attention_heads=4, token_dim=32), "num_attention_heads is 4, the model's is 2"),
    (dict(num_layers=3), "num_layers is 3, the model's is 2"),
    (dict(num_transformer_submodules=2), "of 2 stacks"),
    (dict(task_type="SEQ_2_SEQ_LM", num_transformer_submodules=None), "of 2 stacks"),
    (dict(a_key_of_tomorrow=3), "is not PREFIX_TUNING: a_key_of_tomorrow=3"),
], ids=str)  # fmt: skip
def test_a_prefix_is_checked_against_the_model(changes, message, tmp_path):
    plain = MODELS["llama"](dropout=0.0)
    theirs = peft.get_peft_model(
        copy.deepcopy(plain), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    theirs.save_pretrained(tmp_path)
    refused(plain, edited(tmp_path, tmp_path, **changes), message)


def front_of(theirs, batch):
    """PEFT returns the logits of its virtual tokens too."""
    with torch.no_grad():
        logits = theirs(**{name: t for name, t in batch.items() if name != "labels"}).logits
    return logits[:, logits.shape[1] - batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("architecture, config", [
    ("llama", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    ("llama", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3,
                                 prefix_projection=True, encoder_hidden_size=7)),
    ("qwen3", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, init_weights="zero")),
    ("llama", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    ("qwen2", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3,
                                 prompt_tuning_init="SAMPLE_VOCAB")),
    ("t5", PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)),
    ("t5", PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3,
                              num_transformer_submodules=1)),
], ids=lambda v: getattr(v, "peft_type", v))  # fmt: skip
def test_prefixes_and_prompts_that_peft_saved(architecture, config, tmp_path):
    torch.manual_seed(0)
    plain = ALL[architecture](dropout=0.0).eval()
    trained(plain, copy.deepcopy(config)).save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    ours = pelt_fast.load_peft(copy.deepcopy(plain), tmp_path).eval()
    batch = inputs(plain)
    exact = exactly(ours, batch)["logits"]
    given = dict(batch, decoder_input_ids=batch["input_ids"]) if architecture == "t5" else batch
    exact = exactly(ours, given)["logits"] if architecture == "t5" else exact
    with torch.no_grad():
        assert_near(front_of(theirs, given), ours(**given).logits, exact)
