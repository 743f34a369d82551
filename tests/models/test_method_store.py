"""A store serves saved methods with one base: the latest are in the model, the others on disk."""

import copy
from functools import partial

import pytest
import torch

import pelt_fast
from tests.models.test_route import method, plain
from tests.small import inputs, randomise
from tests.threads import together

NAMES = ("lora", "mam", "pfeiffer", "lora_ffn", "prefix_nomlp")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    base, folder, alone = plain(), tmp_path_factory.mktemp("methods"), {}
    batch = inputs(base, batch=4, length=12, padding="right")
    for name in NAMES:
        model = randomise(pelt_fast.inject(copy.deepcopy(base), method(name)))
        pelt_fast.save(model, folder / name)
        with torch.no_grad():
            alone[name] = model(**batch).logits
    with torch.no_grad():
        alone[None] = base(**batch).logits
    return base, {name: folder / name for name in NAMES}, batch, alone


def run(store, routes, batch, alone):
    with torch.no_grad(), store.route(routes) as model:
        found = model(**batch).logits
    for i, name in enumerate(routes):
        torch.testing.assert_close(found[i], alone[name][i], rtol=1e-12, atol=1e-12)


def test_the_methods_that_were_named_last_stay(saved):
    base, folders, batch, alone = saved
    store = pelt_fast.MethodStore(copy.deepcopy(base), folders, most=2)
    size = sum(p.numel() for p in store.model.parameters())
    run(store, ["lora", None, "mam", "lora"], batch, alone)
    assert store.resident == ["lora", "mam"]
    run(store, ["lora", "pfeiffer", None, None], batch, alone)
    assert store.resident == ["lora", "pfeiffer"]
    run(store, [None, "mam", "lora_ffn", "prefix_nomlp"], batch, alone)
    assert store.resident == ["lora_ffn", "prefix_nomlp"]
    run(store, [None] * 4, batch, alone)
    pelt_fast.eject(store.model)
    assert size == sum(p.numel() for p in store.model.parameters())


def test_many_threads(saved):
    base, folders, batch, alone = saved
    store = pelt_fast.MethodStore(copy.deepcopy(base), folders, most=2)

    def serve(first):
        for i in range(6):
            name, other = NAMES[(first + i) % 5], NAMES[(first + 2 * i + 1) % 5]
            run(store, [name, None, other, name], batch, alone)

    together([partial(serve, first) for first in range(4)])
    assert len(store.resident) <= 2


def test_wrong_arguments(saved, tmp_path):
    base, folders, batch, alone = saved
    with pytest.raises(ValueError, match="most must be a whole number of 1 or more, got 0"):
        pelt_fast.MethodStore(copy.deepcopy(base), folders, most=0)
    with pytest.raises(TypeError, match="folders must map names to folders, got list"):
        pelt_fast.MethodStore(copy.deepcopy(base), [])
    store = pelt_fast.MethodStore(copy.deepcopy(base), folders | {"gone": tmp_path}, most=2)
    with pytest.raises(ValueError, match="no method is named 'other'"), store.route(["other"]):
        pass
    with pytest.raises(FileNotFoundError), store.route(["gone"]):
        pass
    run(store, ["mam", None, None, "mam"], batch, alone)
