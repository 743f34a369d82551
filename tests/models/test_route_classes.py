"""Methods with task heads of other numbers of classes, in one model and in one batch."""

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

import pelt_fast
from pelt_fast.injection.method_names import parameters_of_method
from tests.models.test_parity import small_method
from tests.small import MODELS, MORE, inputs, randomise

ROUTES = ["five", "two", None, "usual", "five", "two"]
CLASSES = {"five": 5, "two": 2}


def method(name: str) -> pelt_fast.PeltConfig:
    return dataclasses.replace(small_method(name), dtype="float64")


METHODS = {
    "two": method("lora"),
    "usual": method("scaled_parallel_adapter"),
    "five": method("houlsby"),
}


def classifier(architecture: str, num_labels: int = 3):
    torch.manual_seed(0)
    model = {**MODELS, **MORE}[architecture](dropout=0.0)
    if model.config.num_labels != num_labels:
        torch.manual_seed(0)
        config = copy.deepcopy(model.config)
        config.num_labels = num_labels
        model = type(model)(config)
    return model.double().eval()


def several(architecture: str):
    model = classifier(architecture)
    return randomise(pelt_fast.inject_named(model, METHODS, together=True, num_labels=CLASSES))


def alone(model, architecture: str, name: str | None, folder):
    """The method ``name`` of ``model`` on a base with its number of classes."""
    other = classifier(architecture, CLASSES.get(name, 3))
    base = classifier(architecture)
    own = dict(base.named_parameters())
    with torch.no_grad():
        for key, parameter in other.named_parameters():
            if parameter.shape == own[key].shape:
                parameter.copy_(own[key])
    if name is None:
        return other
    pelt_fast.save(model, folder / name, method=name)
    return pelt_fast.load(other, folder / name)


def batch_of(model, rows: int) -> dict:
    batch = inputs(model, batch=rows, length=8)
    del batch["labels"]
    return batch


@pytest.mark.parametrize("architecture", ["roberta", "bert"])
def test_logits_are_a_list_and_each_row_is_that_of_its_method_alone(architecture, tmp_path):
    model = several(architecture)
    batch = batch_of(model, len(ROUTES))
    labels = torch.tensor([4, 1, 0, 2, 3, 0])
    with pelt_fast.route(model, ROUTES):
        logits = model(**batch).logits
        pair = model(**batch, return_dict=False)[0]
    assert isinstance(logits, list) and [len(row) for row in logits] == [5, 2, 3, 3, 5, 2]
    assert all(map(torch.equal, logits, pair))
    losses = [F.cross_entropy(row, label) for row, label in zip(logits, labels)]
    torch.stack(losses).sum().backward()
    for name in dict.fromkeys(ROUTES):
        rows = [i for i, route in enumerate(ROUTES) if route == name]
        one = alone(model, architecture, name, tmp_path)
        expected = one(**{key: value[rows] for key, value in batch.items()}).logits
        torch.testing.assert_close(torch.stack([logits[i] for i in rows]), expected)
        if name is None:
            continue
        F.cross_entropy(expected, labels[rows], reduction="sum").backward()
        found = parameters_of_method(model, name)
        for key, parameter in one.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(found[key].grad, parameter.grad)


@pytest.mark.parametrize("names, classes", [
    (["five"] * 3, 5), (["usual", None, "usual"], 3), ([None] * 3, 3), (["two", "two"], 2),
], ids=str)  # fmt: skip
def test_rows_of_one_number_give_a_tensor(names, classes):
    model = several("roberta")
    batch = batch_of(model, len(names))
    with pelt_fast.route(model, names):
        assert model(**batch).logits.shape == (len(names), classes)
    with pelt_fast.disabled(model):
        assert torch.equal(model(**batch).logits, classifier("roberta")(**batch).logits)


def test_a_saved_head_brings_its_number(tmp_path):
    model = several("roberta")
    batch = batch_of(model, 2)
    with pelt_fast.route(model, ["five", "two"]):
        expected = model(**batch).logits
    for name in CLASSES:
        pelt_fast.save(model, tmp_path / name, method=name)
    again = pelt_fast.inject_named(
        classifier("roberta"), {"five": tmp_path / "five", "other": method("lora")}, together=True
    )
    pelt_fast.add_method(again, "two", tmp_path / "two")
    with pelt_fast.route(again, ["five", "two"]):
        assert all(map(torch.equal, again(**batch).logits, expected))
    pelt_fast.drop_method(again, "two")
    pelt_fast.add_method(again, "two", method("lora"))  # of the id that was free
    with pelt_fast.route(again, ["two", "other"]):
        assert again(**batch).logits.shape == (2, 3)
    store = pelt_fast.MethodStore(classifier("roberta"), {n: tmp_path / n for n in CLASSES}, most=1)
    with store.route(["five", "two"]):
        assert all(map(torch.equal, store.model(**batch).logits, expected))


def test_several_tasks_train_at_once(tmp_path):
    model = several("roberta")
    torch.manual_seed(1)
    rows = {
        name: [dict(input_ids=torch.randint(4, 50, (8,)), labels=i % count) for i in range(8)]
        for name, count in {"five": 5, "two": 2, "usual": 3}.items()
    }
    runs = {
        name: pelt_fast.MethodRun(own, learning_rate=1e-3, steps=3, batch_size=4)
        for name, own in rows.items()
    }
    results = pelt_fast.train_several(model, runs, output_dir=tmp_path, use_cpu=True)
    for name, result in results.items():
        assert result.stopped is None and len(result.losses) == 3
        assert all(0.1 < loss < 20 for loss in result.losses), name


BAD = [
    ("roberta", dict(together=False, num_labels=CLASSES), "num_labels needs together=True"),
    (
        "roberta",
        dict(num_labels={"six": 6}),
        "num_labels names 'six'; the methods are two, usual, five",
    ),
    (
        "roberta",
        dict(num_labels={"two": 0}),
        "num_labels of 'two' must be a whole number >= 1, got 0",
    ),
    ("roberta", dict(num_labels={"two": 2.0}), "must be a whole number >= 1, got 2.0"),
    ("bart", dict(num_labels=CLASSES), "BartForConditionalGeneration has no task head of classes"),
]


@pytest.mark.parametrize("architecture, given, message", BAD, ids=[message for *_, message in BAD])
def test_bad_numbers_are_refused_before_anything_changes(architecture, given, message):
    torch.manual_seed(0)
    model = {**MODELS, **MORE}[architecture](dropout=0.0)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        pelt_fast.inject_named(model, METHODS, **{"together": True, **given})
    assert set(model.state_dict()) == before and not hasattr(model, "_pelt")


def test_a_number_without_a_name_is_refused():
    model = classifier("roberta")
    with pytest.raises(TypeError, match=r"num_labels must map names of methods to .*, got int"):
        pelt_fast.inject_named(model, METHODS, together=True, num_labels=3)
    assert not hasattr(model, "_pelt")


def test_labels_another_saved_number_and_a_shared_head_are_refused(tmp_path):
    model = several("roberta")
    batch = inputs(model, batch=2)
    with (
        pelt_fast.route(model, ["usual", "five"]),
        pytest.raises(ValueError, match="labels: rows are under methods with 5 classes"),
    ):
        model(**batch)
    with pelt_fast.route(model, ["usual", None]):
        assert model(**batch).loss is not None
    pelt_fast.save(model, tmp_path, method="five")
    with pytest.raises(
        ValueError, match="num_labels of 'again' is 4, and its saved task head is of 5"
    ):
        pelt_fast.add_method(model, "again", tmp_path, num_labels=4)
    without = dataclasses.replace(method("lora"), train_head=False)
    with pytest.raises(ValueError, match="its config says train_head=False"):
        pelt_fast.add_method(model, "again", without, num_labels=4)
    assert "again" not in model._pelt.methods
