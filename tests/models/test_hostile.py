"""Files from strangers: nothing of them is run, nothing outside is written, no size is believed."""

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import pelt_fast
from pelt_fast.formats.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from pelt_fast.formats.training_state import TRAINED_FILE, load_trained, save_trained
from tests.small import roberta

HUGE = 2**60


def small():
    torch.manual_seed(0)
    return pelt_fast.inject(roberta(), pelt_fast.methods()["mam_glue"].replace(size=3))


class Bomb:
    """What a pickle would run."""

    def __reduce__(self):
        return os.mkdir, (Bomb.place,)


def header(entries: dict, body: bytes = b"") -> bytes:
    """A safetensors file with these entries, whatever they claim."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensor(shape: list, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


FILES = {
    "pickle": lambda whole: pickle.dumps(Bomb()),
    "zip of a pickle": lambda whole: b"PK\x03\x04" + pickle.dumps(Bomb()),
    "nothing": lambda whole: b"",
    "seven bytes": lambda whole: whole[:7],
    "half": lambda whole: whole[: len(whole) // 2],
    "one byte short": lambda whole: whole[:-1],
    "bytes behind": lambda whole: whole + b"more",
    "a header of 2^60 bytes": lambda whole: struct.pack("<Q", HUGE) + whole[8:],
    "a tensor of 2^60 numbers": lambda whole: header({"w": tensor([HUGE], 4 * HUGE)}),
    "a shape that overflows": lambda whole: header({"w": tensor([HUGE, HUGE], 8)}, b"\0" * 8),
    "a negative size": lambda whole: header({"w": tensor([-1], 4)}, b"\0" * 4),
    "offsets behind the end": lambda whole: header({"w": tensor([2], 8)}, b"\0" * 4),
    "an unknown dtype": lambda whole: header({"w": tensor([1], 4, "P32")}, b"\0" * 4),
    "a header that is no JSON": lambda whole: struct.pack("<Q", 4) + b"{{{{",
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", [WEIGHTS_FILE, TRAINED_FILE])
def test_a_file_that_is_not_what_it_says_is_refused_and_nothing_of_it_run(name, kind, tmp_path):
    Bomb.place = str(tmp_path / "ran")
    model = small()
    pelt_fast.save(model, tmp_path)
    save_trained(model, tmp_path)
    file = tmp_path / name
    file.write_bytes(FILES[kind](file.read_bytes()))
    target = roberta() if name == WEIGHTS_FILE else small()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"is damaged|does not (fit|hold)"):
        pelt_fast.load(target, tmp_path) if name == WEIGHTS_FILE else load_trained(target, tmp_path)
    now = target.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], value) for key, value in before.items())
    assert not os.path.exists(Bomb.place)


def test_names_that_lead_elsewhere_are_names_of_nothing(tmp_path):
    model = small()
    save_trained(model, tmp_path)
    tensors = load_file(tmp_path / TRAINED_FILE)
    first = next(iter(tensors))
    for name in ("../../outside", "__class__", f"{first}.data", "/outside", ""):
        changed = {**tensors, name: tensors[first]}
        del changed[first]
        save_file(changed, tmp_path / TRAINED_FILE)
        with pytest.raises(ValueError, match="does not fit this model"):
            load_trained(model, tmp_path)


@pytest.mark.parametrize("change", [
    lambda about: about["config"].update(name=["a", "list"]),
    lambda about: about["config"]["modifications"][0].update(size=HUGE),
    lambda about: about["config"]["modifications"][0].update(size="3; import os"),
    lambda about: about["config"]["modifications"][0].update(form="__import__('os')"),
    lambda about: about["config"].update(dtype="os.system"),
    lambda about: about.update(config="no"),
    lambda about: about.update(tensors={"../x": [HUGE]}),
    lambda about: about.update(base="no"),
    lambda about: about.pop("base"),
])  # fmt: skip
def test_a_config_of_nonsense_is_refused(change, tmp_path):
    pelt_fast.save(small(), tmp_path)
    about = json.loads((tmp_path / CONFIG_FILE).read_text())
    change(about)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(about))
    model = roberta()
    with pytest.raises(ValueError):
        pelt_fast.load(model, tmp_path)
    assert not any("pelt_" in name for name, _ in model.named_parameters())
