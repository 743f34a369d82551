"""save and load: method tensors and JSON only, atomic, refused when they do not fit."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import RobertaForQuestionAnswering

import pelt_fast
from pelt_fast.models.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from tests.models.test_inject import METHODS, same, snapshot, train_a_little
from tests.models.test_parity import small_method
from tests.small import MODELS, bert, inputs, pairs, roberta


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
