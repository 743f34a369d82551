"""save and load: method tensors and JSON only, atomic, refused when they do not fit."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import RobertaForQuestionAnswering

import pelt_fast
from pelt_fast.formats.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from pelt_fast.formats.fingerprint import fingerprint
from tests.models.test_inject import METHODS, same, snapshot, train_a_little
from tests.models.test_parity import small_method
from tests.models.test_quantised import QUANTISED
from tests.models.test_quantised import base as quantised_base
from tests.small import MODELS, bert, inputs, llama, pairs, randomise, roberta


@pytest.mark.parametrize("architecture, method", pairs([*METHODS, "full"]))
def test_round_trip_gives_the_same_model(architecture, method, tmp_path):
    base = MODELS[architecture]()
    model = pelt_fast.inject(copy.deepcopy(base), small_method(method))
    train_a_little(model)
    pelt_fast.save(model, tmp_path / "deep" / "folder")
    twin = pelt_fast.load(copy.deepcopy(base), tmp_path / "deep" / "folder")
    batch = inputs(model, padding="left")
    assert torch.equal(twin.eval()(**batch).logits, model.eval()(**batch).logits)
    train_a_little(twin)  # what was loaded trains on
    if method != "full":
        assert same(snapshot(pelt_fast.eject(twin)), snapshot(base))


@pytest.mark.parametrize("method", METHODS)
def test_only_the_method_and_the_head_are_written(method, tmp_path):
    model = pelt_fast.inject(roberta(), small_method(method))
    pelt_fast.save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        names = set(file.keys())
        numbers = sum(file.get_tensor(name).numel() for name in names)
    own = set(model._pelt.own_trained)
    assert all("pelt_" in name or name in own for name in names)
    assert all(name.startswith("classifier.") or name.endswith(".bias") for name in own)
    assert not any(".mlp" in name or "prefix.embedding" in name for name in names)  # folded away
    count = pelt_fast.count_parameters(model)
    assert numbers == count.kept + count.head


def test_a_users_classification_without_a_config_is_saved(tmp_path):
    class FlowerClassification(torch.nn.Sequential):
        pass

    def flowers():
        torch.manual_seed(0)
        return FlowerClassification(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))

    model = randomise(pelt_fast.inject(flowers(), pelt_fast.lora(2, targets=["0"])))
    pelt_fast.save(model, tmp_path)
    twin, x = pelt_fast.load(flowers(), tmp_path), torch.randn(2, 4)
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_a_folded_prefix_is_what_the_mlp_gave(tmp_path):
    model = pelt_fast.inject(MODELS["bart"](), small_method("prefix"))
    bank = model.model.encoder.pelt_encoder_prefix
    pelt_fast.save(model, tmp_path)
    twin = pelt_fast.load(MODELS["bart"](), tmp_path)
    folded = twin.model.encoder.pelt_encoder_prefix
    assert folded.mlp is None and torch.equal(folded.prefix, bank())
    count = pelt_fast.count_parameters(twin)
    assert count.trainable == count.kept == count.paper


@pytest.fixture
def saved(tmp_path):
    model = pelt_fast.inject(roberta(), small_method("mam_glue"))
    pelt_fast.save(model, tmp_path)
    return tmp_path


def refused(model, folder, error, message):
    before, modules = snapshot(model), [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        pelt_fast.load(model, folder)
    assert same(snapshot(model), before)
    assert [name for name, _ in model.named_modules()] == modules


def test_another_base_is_refused(saved):
    refused(roberta(hidden_size=16), saved, ValueError, "belongs to another base.*'roberta'")
    refused(bert(), saved, ValueError, "belongs to another base")


def test_another_head_is_refused(saved):
    refused(roberta(RobertaForQuestionAnswering), saved, ValueError, "does not fit this model")
    refused(roberta(num_labels=7), saved, ValueError, "has shape .* the model wants")


def test_a_missing_file_is_named(saved, tmp_path):
    (saved / WEIGHTS_FILE).unlink()
    refused(roberta(), saved, FileNotFoundError, f"{WEIGHTS_FILE} is missing")
    refused(roberta(), tmp_path / "nowhere", FileNotFoundError, f"{CONFIG_FILE} is missing")


def test_a_damaged_file_is_named(saved):
    whole = (saved / WEIGHTS_FILE).read_bytes()
    (saved / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    refused(roberta(), saved, ValueError, "is damaged")
    (saved / WEIGHTS_FILE).write_bytes(whole)
    (saved / CONFIG_FILE).write_text("{")
    refused(roberta(), saved, ValueError, "is not a pelt_fast config")


@pytest.mark.parametrize("change, message", [
    (lambda about: about.update(format_version=99), "format version 99, this pelt_fast reads 1"),
    (lambda about: about["config"].update(colour="red"), "not a pelt_fast config of this version"),
    (lambda about: about["config"]["modifications"][0].update(size=0), "size .* must be an integer"),
    (lambda about: about["tensors"].popitem(), "does not hold what"),
])  # fmt: skip
def test_a_config_that_cannot_be_honoured_is_refused(saved, change, message):
    about = json.loads((saved / CONFIG_FILE).read_text())
    change(about)
    (saved / CONFIG_FILE).write_text(json.dumps(about))
    refused(roberta(), saved, ValueError, message)


def test_loading_onto_an_injected_model_is_refused(saved):
    model = pelt_fast.inject(roberta(), small_method("lora"))
    refused(model, saved, ValueError, "already carries 'lora'")


def test_saving_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing is injected"):
        pelt_fast.save(roberta(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


# the real thing: the kernel refuses to let a file grow beyond the limit
FULL_DISK = """
import resource, signal, sys, torch
import pelt_fast
from tests.models.test_parity import small_method
from tests.small import roberta
torch.manual_seed(int(sys.argv[2]))
model = pelt_fast.inject(roberta(), small_method("mam_glue"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    pelt_fast.save(model, sys.argv[1])
except OSError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("there_before", [True, False])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, there_before):
    folder = tmp_path / "method"
    if there_before:
        pelt_fast.save(pelt_fast.inject(roberta(), small_method("mam_glue")), folder)
    before = {p.name: p.read_bytes() for p in folder.glob("*")} if there_before else {}
    ran = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder), "9"], capture_output=True, text=True
    )
    assert f"refused: could not save the method to {folder}" in ran.stdout, ran.stderr
    assert {p.name: p.read_bytes() for p in folder.glob("*")} == before
    assert not list(folder.glob(".*"))


def unfrozen(base, method="lora"):
    """A method, and beside it what its user trains: embeddings and a norm."""
    model = pelt_fast.inject(copy.deepcopy(base), small_method(method, dropout=0.0))
    names = [name for name, _ in model.named_parameters()
             if "pelt_" not in name and ("embed" in name or "norm" in name.lower())][:3]  # fmt: skip
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return randomise(model), names


@pytest.mark.parametrize("architecture, method", pairs([m for m in METHODS if m != "bitfit"]))
def test_what_a_user_unfroze_is_named_or_saved(architecture, method, tmp_path, caplog):
    base = MODELS[architecture](dropout=0.0)
    model, names = unfrozen(base, method)
    pelt_fast.save(model, tmp_path / "without")
    assert len(caplog.records) == 1 and all(name in caplog.text for name in names)
    assert "include_trained=True" in caplog.text
    caplog.clear()
    pelt_fast.save(model, tmp_path / "silent", include_trained=False)
    pelt_fast.save(model, tmp_path / "with", include_trained=True)
    assert not caplog.records
    about = json.loads((tmp_path / "with" / CONFIG_FILE).read_text())
    assert sorted(about["also_trained"]) == sorted(names)
    twin = pelt_fast.load(copy.deepcopy(base), tmp_path / "with")
    batch = inputs(model, padding="right")
    assert torch.equal(twin.eval()(**batch).logits, model.eval()(**batch).logits)
    assert all(twin.get_parameter(name).requires_grad for name in names)
    assert same(snapshot(pelt_fast.eject(twin)), snapshot(base))
    assert [p.requires_grad for p in twin.parameters()] == [
        p.requires_grad for p in base.parameters()
    ]
    for folder in ("without", "silent"):
        plain = pelt_fast.load(copy.deepcopy(base), tmp_path / folder)
        assert same(snapshot(pelt_fast.eject(plain)), snapshot(base))


@pytest.mark.parametrize("first", [CONFIG_FILE, WEIGHTS_FILE])
def test_halves_of_two_saves_are_refused(first, tmp_path):
    for name in ("old", "new"):
        model = randomise(pelt_fast.inject(roberta(), small_method("mam_glue")))
        pelt_fast.save(model, tmp_path / name)
    (tmp_path / "old" / first).write_bytes((tmp_path / "new" / first).read_bytes())
    refused(roberta(), tmp_path / "old", ValueError, "halves of two saves")


def test_a_file_without_a_digest_or_with_the_old_names_still_loads(tmp_path):
    from safetensors.torch import load_file, save_file

    base = MODELS["bert"](dropout=0.0)
    model = randomise(pelt_fast.inject(copy.deepcopy(base), small_method("houlsby")))
    pelt_fast.save(model, tmp_path)
    old = {
        name.replace(".norm.weight", ".norm_weight").replace(".norm.bias", ".norm_bias"): tensor
        for name, tensor in load_file(tmp_path / WEIGHTS_FILE).items()
    }
    assert any(name.endswith("norm_weight") for name in old)
    save_file(old, tmp_path / WEIGHTS_FILE)
    about = json.loads((tmp_path / CONFIG_FILE).read_text())
    del about["digest"], about["also_trained"]
    about["tensors"] = {name: list(tensor.shape) for name, tensor in old.items()}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(about))
    twin = pelt_fast.load(copy.deepcopy(base), tmp_path)
    assert same(snapshot(twin), snapshot(model))
    state = {n.replace(".norm.", ".norm_") if "pelt_" in n else n: t
             for n, t in model.state_dict().items()}  # fmt: skip
    twin = pelt_fast.inject(copy.deepcopy(base), small_method("houlsby"))
    twin.load_state_dict(state)
    assert same(snapshot(twin), snapshot(model))


@pytest.mark.parametrize("quantise", QUANTISED)
@pytest.mark.parametrize("architecture", ["llama", "bart"])
def test_a_method_of_a_quantised_base_loads_on_the_whole_one_and_back(
    architecture, quantise, tmp_path
):
    quantised = randomise(
        pelt_fast.inject(quantised_base(architecture, quantise), small_method("lora"))
    )
    pelt_fast.save(quantised, tmp_path / "a")
    whole = pelt_fast.load(quantised_base(architecture, lambda model: None), tmp_path / "a")
    for name, parameter in quantised.named_parameters():
        if "pelt_" in name:
            assert torch.equal(whole.get_parameter(name), parameter)
    pelt_fast.save(whole, tmp_path / "b")
    pelt_fast.load(quantised_base(architecture, quantise), tmp_path / "b")


@pytest.mark.parametrize("method", [*METHODS, "full", "linear_probe"])
def test_a_head_of_another_number_of_labels_can_be_left_out(method, tmp_path):
    base = roberta(num_labels=3, dropout=0.0)
    pelt_fast.save(randomise(pelt_fast.inject(base, small_method(method))), tmp_path)
    other = roberta(num_labels=7, dropout=0.0)
    refused(other, tmp_path, ValueError, r"head=False\) leaves the saved one out")
    own = {n: p.clone() for n, p in other.named_parameters() if n.startswith("classifier")}
    pelt_fast.load(other, tmp_path, head=False)
    for name, value in own.items():
        assert torch.equal(other.get_parameter(name), value)
        assert other.get_parameter(name).requires_grad
    mine = dict(base.named_parameters())
    for name, parameter in other.named_parameters():
        if not name.startswith("classifier") and name in mine and parameter.requires_grad:
            assert torch.equal(parameter, mine[name])


def test_a_fingerprint_is_of_logical_names_and_shapes():
    peft = pytest.importorskip("peft")
    model = llama()
    plain = fingerprint(model)
    assert fingerprint(torch.compile(model)) == plain
    assert fingerprint(pelt_fast.inject(model, small_method("mam"))) == plain
    pelt_fast.eject(model)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    assert fingerprint(peft.get_peft_model(model, config)) == plain
    tied, untied = MODELS["bart"](), MODELS["bart"](tie_word_embeddings=False)
    assert fingerprint(tied) == fingerprint(untied)
    assert fingerprint(llama(hidden_size=16)) != plain


@pytest.mark.parametrize("export", [pelt_fast.export_peft, pelt_fast.export_adapterhub])
def test_an_export_that_is_cut_leaves_none_and_no_mixture(export, tmp_path, monkeypatch):
    first, second = (randomise(pelt_fast.inject(llama(), small_method("lora"))) for _ in "ab")
    export(first, tmp_path)
    replace, moved = os.replace, []

    def cut(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        export(second, tmp_path)
    assert moved and not (tmp_path / "adapter_config.json").exists()
    assert not list(tmp_path.glob(".*"))
