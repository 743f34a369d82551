"""Several methods in one batch: each row has the output and the gradients of its method alone."""

import copy
import dataclasses

import pytest
import torch

import pelt_fast
from pelt_fast.injection.method_names import parameters_of_method
from pelt_fast.injection.record import injection_of
from tests.models.test_parity import small_method
from tests.small import MODELS, MORE, inputs, randomise

EPS = 1e-12  # of fp64 sums in another order
MIXTURES = [
    ("lora", "mam", "houlsby"),
    ("lora", "lora", "lora"),
    ("bitfit", "lora_ffn", "prefix_ungated"),
    ("pfeiffer", "parallel_adapter_attn", "multi_head_parallel_adapter"),
    ("prefix_lora_ffn", "scaled_parallel_adapter", "mam_glue"),
    ("learned_scale_parallel_adapter", "parallel_attn_parallel_ffn", "parallel_adapter_ffn"),
]
ROUTES = ["b", None, "a", "c", "c", None, "a", "a", "b", "c", "a", None]


def method(name: str, **changes) -> pelt_fast.PeltConfig:
    return dataclasses.replace(small_method(name), dtype="float64", **changes)


def plain(architecture: str = "bart", dropout: float = 0.0):
    torch.manual_seed(0)
    return {**MODELS, **MORE}[architecture](dropout=dropout).double().eval()


def has_biases(architecture: str) -> bool:
    return architecture not in ("llama",)


class Several:
    """A model with methods a, b, c in it together, and each of them alone in a model."""

    def __init__(self, base, methods: dict, tmp_path, training: bool = False):
        self.base, self.alone = base, {}
        for name, config in methods.items():
            model = randomise(pelt_fast.inject(copy.deepcopy(base), config))
            pelt_fast.save(model, tmp_path / name)
            pelt_fast.eject(model)
            self.alone[name] = pelt_fast.load(model, tmp_path / name).train(training)
        folders = {name: tmp_path / name for name in methods}
        self.model = pelt_fast.inject_named(copy.deepcopy(base), folders, together=True)
        self.model.train(training)

    def batch(self, rows: int) -> dict:
        return inputs(self.base, batch=rows, length=rows + 4, padding="right")

    def check(self, routes, batch=None, seed: int | None = None) -> None:
        """Outputs and gradients of each row's method, against that method alone."""
        batch = self.batch(len(routes)) if batch is None else batch
        self.model.zero_grad()
        if seed is not None:
            self._seed(seed)
        with pelt_fast.route(self.model, routes):
            logits = self.model(**batch).logits
            (logits**2).sum().backward()
        for name in dict.fromkeys(routes):
            rows = [i for i, route in enumerate(routes) if route == name]
            part = {key: value[rows] for key, value in batch.items()}
            alone = self.base if name is None else self.alone[name]
            alone.zero_grad()
            if seed is not None:
                torch.manual_seed(seed)
            expected = alone(**part).logits
            torch.testing.assert_close(logits[rows], expected, rtol=EPS, atol=EPS)
            if name is not None:
                (expected**2).sum().backward()
                self._check_gradients(name)

    def _check_gradients(self, name: str) -> None:
        found = parameters_of_method(self.model, name)
        expected = {n: p for n, p in self.alone[name].named_parameters() if p.requires_grad}
        assert found.keys() == expected.keys()
        largest = max(p.grad.abs().max() for p in expected.values() if p.grad is not None)
        for path, parameter in expected.items():
            if parameter.grad is None:
                assert found[path].grad is None or not found[path].grad.any(), path
                continue
            error = (found[path].grad - parameter.grad).abs().max()
            assert error <= 1e-11 * largest, (path, error, largest)

    def _seed(self, seed: int) -> None:
        routing = injection_of(self.model).routing
        for number in routing.ids.values():
            routing.generators[number] = torch.Generator().manual_seed(seed)


def three(architecture: str, names, tmp_path, **settings) -> Several:
    base = plain(architecture)
    methods = {key: method(name) for key, name in zip("abc", names)}
    return Several(base, methods, tmp_path, **settings)


@pytest.mark.parametrize("names", MIXTURES, ids="+".join)
@pytest.mark.parametrize("architecture", ["bart", "roberta", "llama"])
def test_each_row_is_that_of_its_method_alone(architecture, names, tmp_path):
    if "bitfit" in names and not has_biases(architecture):
        names = tuple("lora" if name == "bitfit" else name for name in names)
    several = three(architecture, names, tmp_path)
    several.check(ROUTES)
    pelt_fast.eject(several.model)
    batch = several.batch(3)
    assert torch.equal(several.model(**batch).logits, several.base(**batch).logits)


@pytest.mark.parametrize("architecture", ["t5", "t5_gated", "gpt2", "opt", "modernbert", "mbart"])
def test_other_layouts(architecture, tmp_path):
    three(architecture, ("lora", "mam", "parallel_adapter_ffn"), tmp_path).check(ROUTES)


@pytest.mark.parametrize(
    "routes", [["a"] * 3, [None] * 3, ["a", "a", None], ["b"], ["a", "b", "c"], ["c", "c", "a"]],
    ids=str,
)  # fmt: skip
def test_rows_of_one_method_of_none_and_a_batch_of_one(routes, tmp_path):
    three("bart", ("lora", "mam", "houlsby"), tmp_path).check(routes)


@pytest.mark.parametrize("names", [("lora", "lora_ffn", "mam"), ("pfeiffer", "mam", "lora")])
def test_each_method_draws_the_masks_that_it_draws_alone(names, tmp_path):
    several = three("bart", names, tmp_path, training=True)
    several.check(ROUTES, seed=7)


def test_ranks_of_all_sizes(tmp_path):
    sizes = {"a": 1, "b": 3, "c": 100}
    loras = {
        key: dataclasses.replace(pelt_fast.lora(r=r, alpha=2 * r), dtype="float64")
        for key, r in sizes.items()
    }
    Several(plain(), loras, tmp_path).check(ROUTES)
