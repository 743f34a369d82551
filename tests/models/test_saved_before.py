"""Files that earlier versions wrote load, and the model computes what it computed then."""

import json

import pytest
import torch
from safetensors.torch import load_file

import pelt_fast
from pelt_fast.formats.checkpoint import read_config
from pelt_fast.integrations.trainer import load_trained
from tests.saved import cases

FOLDERS = sorted(path.parent for path in cases.SAVED.glob(f"*/*/{cases.EXPECTED_FILE}"))
IDS = ["-".join(folder.parts[-2:]) for folder in FOLDERS]
TRAINED = [folder for folder in FOLDERS if (folder / cases.TRAINED_FILE).exists()]
ROUNDING = 1e-5  # of the largest logit: another instruction set adds in another order

every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=IDS)


def logits_and_expected(model, folder):
    batch = load_file(folder / cases.EXPECTED_FILE)
    expected = batch.pop("logits")
    with torch.no_grad():
        return model.eval()(**batch).logits, expected


def assert_same_numbers(model, folder):
    logits, expected = logits_and_expected(model, folder)
    assert (logits - expected).abs().max() <= ROUNDING * expected.abs().max()


def test_every_method_of_0_1_0_is_there():
    assert {folder.name for folder in FOLDERS if folder.parent.name == "0.1.0"} == set(cases.CASES)
    assert {folder.name for folder in TRAINED} == set(cases.TRAINED)


@every_folder
def test_a_saved_method_loads_and_its_numbers_stand(folder):
    model = pelt_fast.load(cases.base(folder.name), folder)
    assert_same_numbers(model, folder)


@every_folder
def test_the_numbers_are_those_of_the_method(folder):
    """The base alone is far away from them."""
    logits, expected = logits_and_expected(cases.base(folder.name), folder)
    assert (logits - expected).abs().max() > 1000 * ROUNDING * expected.abs().max()


@every_folder
def test_what_is_loaded_is_saved_as_the_same_tensors(folder, tmp_path):
    model = pelt_fast.load(cases.base(folder.name), folder)
    pelt_fast.save(model, tmp_path)
    before, after = (load_file(f / cases.METHOD_FILE) for f in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_config(tmp_path)[0] == read_config(folder)[0]


@every_folder
def test_a_state_dict_and_an_optimizer_of_then_fit(folder):
    config = read_config(folder)[0]
    model = pelt_fast.inject(cases.base(folder.name), config)
    names = cases.names(cases.base(folder.name), model)
    assert names == json.loads((folder / cases.NAMES_FILE).read_text())


@pytest.mark.parametrize("folder", TRAINED, ids=lambda folder: folder.name)
def test_a_checkpoint_of_the_trainer_loads(folder):
    model = pelt_fast.inject(cases.base(folder.name), read_config(folder)[0])
    load_trained(model, folder)
    assert_same_numbers(model, folder)
