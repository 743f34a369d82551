"""Names of 0.1.0 still work, and each says in one line which name took its place."""

import importlib
import inspect
import subprocess
import sys
import warnings

import pytest

import pelt_fast
from pelt_fast import deprecated
from pelt_fast.formats import hub
from pelt_fast.layouts.table import rows_of
from tests.models.test_parity import small_method
from tests.small import roberta

TRAINER = ("PeltTrainer", "PeltSeq2SeqTrainer", "last_checkpoint")


def one_line(caught, old: str, new: str) -> None:
    """One warning was given, at a line of this file, and it names both."""
    (warning,) = caught
    assert warning.category is DeprecationWarning
    assert warning.filename == __file__
    text = str(warning.message)
    assert "\n" not in text and text == f"{old} is deprecated: use {new}"


@pytest.fixture
def caught():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


@pytest.mark.parametrize("old, new", deprecated.RENAMED.items())
def test_an_old_name_is_the_new_one(old, new, caught):
    found = getattr(pelt_fast, old)
    one_line(caught, f"pelt_fast.{old}", f"pelt_fast.{new}")
    assert found is getattr(pelt_fast, new)
    assert old not in pelt_fast.__all__ and new in pelt_fast.__all__


def test_a_name_that_is_imported_from_the_package_warns_there_too(caught):
    from pelt_fast import SlotMap

    assert SlotMap is pelt_fast.Layout
    one_line(caught, "pelt_fast.SlotMap", "pelt_fast.Layout")


def test_new_names_do_not_warn(caught):
    for name in pelt_fast.__all__:
        getattr(pelt_fast, name)
    assert caught == []


@pytest.mark.parametrize("name", TRAINER)
def test_the_trainer_is_found_where_it_was(name, caught):
    pytest.importorskip("accelerate")
    from pelt_fast import trainer
    from pelt_fast.integrations import trainer as new

    caught.clear()  # what other libraries say at import
    assert getattr(trainer, name) is getattr(new, name)
    one_line(caught, f"pelt_fast.trainer.{name}", f"pelt_fast.integrations.trainer.{name}")


@pytest.mark.parametrize("module", ["pelt_fast", "pelt_fast.trainer"])
def test_an_unknown_name_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        _ = importlib.import_module(module).nothing


RENAMED_KEYWORD = ("inject", "inject_named", "load", "load_from_hub")


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls a function that has the keyword as a user does."""
    folder = str(tmp_path / "saved")
    pelt_fast.save(pelt_fast.inject(roberta(), small_method("lora")), folder)
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: folder)
    second = {
        "inject": small_method("lora"), "inject_named": {"a": small_method("lora")},
        "load": folder, "load_from_hub": "someone/something",
    }  # fmt: skip

    def run(name, **keywords):
        model = roberta()
        row = rows_of(model)[0]
        return getattr(pelt_fast, name)(model, second[name], **dict.fromkeys(keywords, row))

    return run


@pytest.mark.parametrize("name", RENAMED_KEYWORD)
def test_the_old_keyword_is_the_new_one(name, call, caught):
    model = call(name, slots=True)
    one_line(caught, f"{name}(slots=...)", f"{name}(layout=...)")
    with_new = call(name, layout=True)
    assert len(caught) == 1
    assert [n for n, _ in model.named_modules()] == [n for n, _ in with_new.named_modules()]


@pytest.mark.parametrize("name", RENAMED_KEYWORD)
def test_both_keywords_are_refused(name, call):
    with pytest.raises(TypeError, match=f"{name} got slots and layout"):
        call(name, slots=True, layout=True)


def test_these_are_all_functions_with_the_keyword():
    found = {
        name for name in pelt_fast.__all__
        if callable(getattr(pelt_fast, name)) and not inspect.isclass(getattr(pelt_fast, name))
        and "layout" in inspect.signature(getattr(pelt_fast, name)).parameters
    }  # fmt: skip
    assert found == set(RENAMED_KEYWORD)


def test_a_warning_is_an_error_under_w_error():
    """What a test suite of a user's runs."""
    code = "import pelt_fast; pelt_fast.methods; pelt_fast.SlotMap"
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True)
    last = ran.stderr.strip().splitlines()[-1]
    assert last == "DeprecationWarning: pelt_fast.SlotMap is deprecated: use pelt_fast.Layout"
