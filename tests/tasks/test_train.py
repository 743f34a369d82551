"""Training: learning rates by group, rows in order of length."""

import pytest

import pelt_fast
from pelt_fast.tasks.data import Split
from pelt_fast.tasks.train import PREFIX_SHARE, Recipe, by_length, parameter_groups
from tests.models.test_parity import small_method
from tests.small import roberta


@pytest.mark.parametrize("method", ["full", "lora", "mam_glue", "prefix"])
def test_every_trainable_parameter_is_in_one_group(method):
    model = pelt_fast.inject(roberta(), small_method(method))
    groups = parameter_groups(model, 1e-2)
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(trainable) and set(grouped) == trainable
    slow = {id(p) for g in groups if g["lr"] == 1e-2 * PREFIX_SHARE for p in g["params"]}
    bank = getattr(model.roberta.encoder, "pelt_encoder_prefix", None)
    assert slow == ({id(p) for p in bank.parameters()} if bank is not None else set())


def test_the_rate_is_the_users_or_the_methods():
    assert Recipe(learning_rate=3e-4).rate("lora") == 3e-4
    assert Recipe().rate("full") < Recipe().rate("lora")


def test_rows_by_length_stay_whole():
    split = Split(["long text", "a", "mid"], ["x", "y", "z"], [0, 1, 2])
    assert by_length(split) == Split(["a", "mid", "long text"], ["y", "z", "x"], [1, 2, 0])
