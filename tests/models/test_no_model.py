"""What is no model is refused by name, before a file is read."""

import pytest

import pelt_fast

CALLS = {
    "load": lambda it: pelt_fast.load(it, "nowhere"),
    "load_peft": lambda it: pelt_fast.load_peft(it, "nowhere"),
    "load_adapterhub": lambda it: pelt_fast.load_adapterhub(it, "nowhere"),
    "load_from_hub": lambda it: pelt_fast.load_from_hub(it, "me/nothing"),
    "restore_peft": pelt_fast.restore_peft,
    "save": lambda it: pelt_fast.save(it, "nowhere"),
    "merge": pelt_fast.merge,
    "eject": pelt_fast.eject,
    "explain": pelt_fast.explain,
    "count_parameters": pelt_fast.count_parameters,
    "inject": lambda it: pelt_fast.inject(it, "lora"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("given", ["bert-base-uncased", None], ids=["a name", "None"])
def test_no_model(name, given):
    kind = type(given).__name__
    with pytest.raises(TypeError, match=f"model must be a transformers model.*got.*{kind}"):
        CALLS[name](given)
