"""Several methods in one batch: each row has the output and the gradients of its method alone."""

import copy
import dataclasses
from functools import partial

import pytest
import torch

import pelt_fast
from pelt_fast.injection.method_names import parameters_of_method
from pelt_fast.injection.record import injection_of
from pelt_fast.modules import routing
from tests.models.test_parity import small_method
from tests.small import MODELS, MORE, inputs, randomise
from tests.threads import together

EPS = 1e-12  # of fp64 sums in another order
MIXTURES = [
    ("lora", "mam", "houlsby"),
    ("lora", "lora", "lora"),
    ("bitfit", "lora_ffn", "prefix_ungated"),
    ("mam", "bitfit", "lora_ffn"),
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
            if logits.requires_grad:
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


@pytest.mark.parametrize("architecture", ["t5", "gpt2", "opt", "phi3", "modernbert", "xlm-roberta"])
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


def test_beams_and_returned_sequences_keep_the_method_of_their_row(tmp_path):
    several = three("bart", ("lora", "mam", "houlsby"), tmp_path)
    routes = ["b", None, "a", "c"]
    batch = several.batch(len(routes))
    del batch["labels"]
    how = dict(max_new_tokens=6, min_new_tokens=2, num_beams=3, num_return_sequences=2)
    with pelt_fast.route(several.model, routes):
        found = several.model.generate(**batch, **how).unflatten(0, (len(routes), -1))
    for i, name in enumerate(routes):
        alone = several.base if name is None else several.alone[name]
        expected = alone.generate(**{k: v[i : i + 1] for k, v in batch.items()}, **how)
        length = min(expected.shape[1], found.shape[2])
        assert torch.equal(found[i, :, :length], expected[:, :length]), name


def test_a_decoder_generates_each_row_under_its_method(tmp_path):
    several = three("llama", ("lora", "mam", "prefix_ungated"), tmp_path)
    routes = ["c", "a", None, "b"]
    batch = inputs(several.base, batch=len(routes), length=9, padding="left")
    del batch["labels"]
    with pelt_fast.route(several.model, routes):
        found = several.model.generate(**batch, max_new_tokens=5, do_sample=False)
    for i, name in enumerate(routes):
        alone = several.base if name is None else several.alone[name]
        row = {k: v[i : i + 1] for k, v in batch.items()}
        expected = alone.generate(**row, max_new_tokens=5, do_sample=False)
        assert torch.equal(found[i : i + 1, : expected.shape[1]], expected), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_runs_again_under_the_routes_of_its_forward(reentrant, tmp_path):
    several = three("bart", ("lora", "mam", "houlsby"), tmp_path)
    model, batch = several.model, several.batch(6)
    routes = ["a", "b", None, "c", "c", "a"]

    def gradients():
        model.zero_grad()
        with pelt_fast.route(model, routes):
            loss = (model(**batch).logits ** 2).sum()
        pelt_fast.route(model, "b")  # what is in force when the backward runs
        loss.backward()
        pelt_fast.route(model, None)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.train()
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    if reentrant:
        model.enable_input_require_grads()
    for dropout in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.0
    found = gradients()
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


def test_methods_are_saved_added_and_dropped_while_others_stay(tmp_path):
    several = three("bart", ("lora", "mam", "houlsby"), tmp_path)
    model, batch = several.model, several.batch(4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    pelt_fast.save(model, tmp_path / "again", method="b")
    pelt_fast.drop_method(model, "b")
    assert not any(".b." in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="no method is named 'b'; there are a, c"):
        pelt_fast.route(model, ["b"])
    pelt_fast.add_method(model, "b", tmp_path / "again")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    several.check(ROUTES[:4], batch)
    pelt_fast.set_active(model, "c")
    assert torch.equal(model(**batch).logits, pelt_fast.load(
        copy.deepcopy(several.base), tmp_path / "c").eval()(**batch).logits)  # fmt: skip


def test_a_method_that_cannot_be_added_leaves_nothing(tmp_path):
    several = three("bart", ("lora", "mam", "houlsby"), tmp_path)
    model = several.model
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="trains the task head alone"):
        pelt_fast.add_method(model, "d", "linear_probe")
    with pytest.raises(ValueError, match="named 'a' already"):
        pelt_fast.add_method(model, "a", "lora")
    with pytest.raises(FileNotFoundError):
        pelt_fast.add_method(model, "d", tmp_path / "nothing")
    assert names == [name for name, _ in model.named_parameters()]
    several.check(ROUTES[:6])


def test_the_base_alone_answers_in_disabled(tmp_path):
    several = three("roberta", ("bitfit", "mam", "lora"), tmp_path)
    batch = several.batch(3)
    with pelt_fast.route(several.model, ["a", "b", "c"]), pelt_fast.disabled(several.model):
        found = several.model(**batch).logits
    assert torch.equal(found, several.base(**batch).logits)


def test_a_copy_has_routes_of_its_own(tmp_path):
    several = three("bart", ("lora", "mam", "houlsby"), tmp_path)
    batch = several.batch(3)
    pelt_fast.route(several.model, ["a", "b", None])
    expected = several.model(**batch).logits
    copied = copy.deepcopy(several.model)
    pelt_fast.route(copied, ["a", "b", None])
    pelt_fast.route(several.model, "c")
    assert torch.equal(copied(**batch).logits, expected)


def test_routes_are_read_in_each_forward_from_a_tensor(tmp_path):
    several = three("bart", ("lora", "mam", "houlsby"), tmp_path)
    batch, ids = several.batch(3), torch.tensor([0, 1, -1])
    pelt_fast.route(several.model, ids)
    first = several.model(**batch).logits
    ids.copy_(torch.tensor([2, 2, 2]))
    second = several.model(**batch).logits
    pelt_fast.route(several.model, ["c"] * 3)
    assert torch.equal(second, several.model(**batch).logits) and not torch.equal(first, second)


@pytest.mark.parametrize("methods, error, message", [
    (["a", "x"], ValueError, "no method is named 'x'; there are a, b, c"),
    ([], ValueError, "at least one row, got none"),
    (3, TypeError, "a name, a sequence of names or None, or an int64 tensor, got int"),
    (torch.tensor([0, 7]), ValueError, r"methods holds 7; there are -1 \(none\), 0 \(a\)"),
    (torch.tensor([0.0]), TypeError, "int64 of shape"),
])  # fmt: skip
def test_routes_that_cannot_be(methods, error, message, tmp_path):
    several = three("bart", ("lora", "mam", "houlsby"), tmp_path)
    with pytest.raises(error, match=message):
        pelt_fast.route(several.model, methods)


def test_a_batch_of_another_size_and_a_model_without_methods_together(tmp_path):
    several = three("bart", ("lora", "mam", "houlsby"), tmp_path)
    with (
        pelt_fast.route(several.model, ["a", "b"]),
        pytest.raises(
            ValueError, match="routes name the methods of 2 rows, and this forward has 3"
        ),
    ):
        several.model(**several.batch(3))
    with pytest.raises(ValueError, match="together=True"):
        pelt_fast.route(several.alone["a"], "a")
    with pytest.raises(ValueError, match="without a dot"):
        pelt_fast.inject_named(plain(), {"a.b": "lora"}, together=True)


def test_only_the_methods_of_the_rows_are_computed_without_gradients(tmp_path):
    several = three("bart", ("lora", "mam", "houlsby"), tmp_path)
    for routes in (["a", "a", None], ["b", None, None], ["c", "a", None]):
        batch = several.batch(3)
        with torch.no_grad(), pelt_fast.route(several.model, routes):
            found = several.model(**batch).logits
        for i, name in enumerate(routes):
            alone = several.base if name is None else several.alone[name]
            expected = alone(**{key: value[i : i + 1] for key, value in batch.items()}).logits
            torch.testing.assert_close(found[i : i + 1], expected, rtol=EPS, atol=EPS)


def test_threads_have_routes_of_their_own(tmp_path):
    several = three("bart", ("lora", "mam", "houlsby"), tmp_path)
    batch = several.batch(3)

    def outputs(name):
        with torch.no_grad(), pelt_fast.route(several.model, [name, None, name]):
            return [several.model(**batch).logits for _ in range(5)]

    for name, found in zip("ab", together([partial(outputs, name) for name in "ab"])):
        expected = outputs(name)[0]
        assert all(torch.equal(output, expected) for output in found), name


@pytest.mark.parametrize("call", [
    pelt_fast.merge,
    lambda model: pelt_fast.export_peft(model, "folder"),
    lambda model: pelt_fast.export_adapterhub(model, "folder"),
], ids=["merge", "peft", "adapterhub"])  # fmt: skip
def test_what_is_for_one_method(call, tmp_path):
    several = three("bart", ("lora", "mam", "houlsby"), tmp_path)
    with pytest.raises(ValueError, match="is for one method, and several are in this model"):
        call(several.model)


def test_a_compiled_model_runs_eagerly_under_routes(tmp_path):
    several = three("llama", ("lora", "mam", "lora_ffn"), tmp_path)
    batch = several.batch(3)
    compiled = torch.compile(several.model, backend="eager")
    first = compiled(**batch).logits
    with pelt_fast.route(compiled, ["b", None, "c"]):
        found = compiled(**batch).logits
    with pelt_fast.route(several.model, ["b", None, "c"]):
        assert torch.equal(found, several.model(**batch).logits)
    assert torch.equal(compiled(**batch).logits, first)


def test_explain_and_counts_know_every_method(tmp_path):
    several = three("bart", ("lora", "mam", "houlsby"), tmp_path)
    counts = [pelt_fast.count_parameters(model).paper for model in several.alone.values()]
    assert pelt_fast.count_parameters(several.model).paper == sum(counts)
    sites = [len(pelt_fast.explain(model).sites) for model in several.alone.values()]
    assert len(pelt_fast.explain(several.model).sites) == sum(sites)
    assert "several methods" in str(pelt_fast.explain(several.model))


@pytest.mark.parametrize("architecture", ["bart", "roberta", "llama"])
def test_a_captured_graph_computes_all_rows_and_takes_each_methods(
    architecture, tmp_path, monkeypatch
):
    """What is not known on the host: which rows a site that runs by itself has."""
    several = three(architecture, ("houlsby", "multi_head_parallel_adapter", "pfeiffer"), tmp_path)
    monkeypatch.setattr(routing, "capturing", lambda: True)
    several.check(ROUTES)
