"""Several methods in one training: each has the numbers that it has alone."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import TrainerCallback, get_scheduler

import pelt_fast
from pelt_fast.injection.method_names import parameters_of_method
from pelt_fast.injection.record import injection_of
from pelt_fast.integrations.several.methods import TrainedMethod
from pelt_fast.integrations.several.steps import Steps, seed_of
from pelt_fast.integrations.several.trainer import SeveralTrainer, as_alone
from pelt_fast.integrations.trainer import PeltTrainer
from tests.models.test_route import method, plain
from tests.small import PAD, VOCABULARY

METHODS = {"a": "lora", "b": "mam", "c": "houlsby"}
LENGTH = 7


def rows(count: int, seed: int, architecture: str = "bart", ragged: bool = False) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(4, VOCABULARY, (LENGTH - i % 3 * ragged,), generator=generator)
        label = int(ids[0]) % 3 if architecture in ("bert", "roberta") else ids.tolist()
        found.append(dict(input_ids=ids.tolist(), labels=label))
    return found


def collate(features: list[dict]) -> dict:
    """Pads to the longest row, with a mask."""
    longest = max(len(row["input_ids"]) for row in features)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([f[name] + [fill] * (longest - len(f[name])) for f in features])

    masks = [len(row["input_ids"]) * [1] + (longest - len(row["input_ids"])) * [0]
             for row in features]  # fmt: skip
    whole = isinstance(features[0]["labels"], list)
    labels = padded("labels", -100) if whole else torch.tensor([f["labels"] for f in features])
    return dict(
        input_ids=padded("input_ids", PAD), attention_mask=torch.tensor(masks), labels=labels
    )


def run(seed: int, architecture: str = "bart", **changes) -> pelt_fast.MethodRun:
    settings = dict(learning_rate=3e-3, steps=5, batch_size=3, seed=seed, weight_decay=0.1)
    data = rows(8, seed, architecture, changes.pop("ragged", False))
    return pelt_fast.MethodRun(data, **(settings | changes))


def several(architecture: str, names: dict = METHODS, **changes):
    torch.manual_seed(1)
    configs = {key: method(name).replace(**changes) for key, name in names.items()}
    return pelt_fast.inject_named(plain(architecture), configs, together=True)


def train(model, runs: dict, folder, **more) -> dict:
    settings = dict(use_cpu=True, disable_tqdm=True, logging_steps=1, data_collator=collate)
    return pelt_fast.train_several(model, runs, output_dir=folder / "out", **(settings | more))


def tensors(model, name: str) -> dict:
    return {n: p.detach().clone() for n, p in parameters_of_method(model, name).items()}


def check_equal(found: dict, expected: dict, atol: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol)


def by_hand(model, one: pelt_fast.MethodRun) -> list[float]:
    """A loop with the method alone in the model."""
    named = PeltTrainer.get_decay_parameter_names(PeltTrainer.__new__(PeltTrainer), model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [
        dict(params=[p for n, p in trained.items() if (n in named) == decays],
             weight_decay=one.weight_decay * decays)
        for decays in (True, False)
    ]  # fmt: skip
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=one.learning_rate)
    schedule = get_scheduler(one.schedule, optimizer, one.warmup_steps, one.steps)
    losses, read = [], Steps({"": one})
    for step in range(one.steps):
        torch.manual_seed(seed_of(one.seed, "step", step))
        loss = model.train()(**collate(read[step].rows[""])).loss
        loss.backward()
        if one.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained.values(), one.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def three_runs(architecture: str = "bart", **changes) -> dict:
    return {
        "a": run(1, architecture, schedule="cosine", warmup_steps=2, **changes),
        "b": run(2, architecture, steps=3, batch_size=8, max_grad_norm=0.05, **changes),
        "c": run(3, architecture, batch_size=2, schedule="constant", **changes),
    }


@pytest.mark.parametrize("architecture", ["bart", "roberta"])
def test_each_method_trains_as_alone_by_hand(architecture, tmp_path):
    model, runs = several(architecture), three_runs(architecture)
    alone = {}
    for name in runs:
        pelt_fast.save(model, tmp_path / name, method=name)
        alone[name] = pelt_fast.load(plain(architecture), tmp_path / name)
        if name == "b":  # save folds the prefix's MLP
            pelt_fast.drop_method(model, name)
            pelt_fast.add_method(model, name, tmp_path / name)
    results = train(model, runs, tmp_path)
    for name, one in runs.items():
        losses = by_hand(alone[name], one)
        assert results[name].losses == pytest.approx(losses, abs=1e-12), name
        expected = {n: p.detach() for n, p in alone[name].named_parameters() if p.requires_grad}
        check_equal(tensors(model, name), expected, atol=1e-10)
        assert losses[-1] != losses[0]


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("architecture", ["bart", "roberta", "llama"])
def test_a_method_does_not_depend_on_those_beside_it(architecture, tmp_path):
    runs, before = three_runs(architecture), several(architecture)
    together = several(architecture)
    assert all(m.dropout_p for m in together.modules() if hasattr(m, "dropout_p"))  # they drop
    first = train(together, runs, tmp_path)
    for name in runs:
        alone = several(architecture)
        result = train(alone, {name: runs[name]}, tmp_path)[name]
        assert first[name].losses == pytest.approx(result.losses, abs=1e-12), name
        check_equal(tensors(together, name), tensors(alone, name), atol=1e-10)
        for other in runs.keys() - {name}:  # those that no run names
            check_equal(tensors(alone, other), tensors(before, other), atol=0)


def test_the_longest_row_of_all_methods_is_what_the_batch_is_padded_to(tmp_path):
    runs = {
        "a": run(1, ragged=True),
        "b": dataclasses.replace(run(2), batch_size=1),
        "c": run(3, ragged=True),
    }
    model = several("bart", dropout=0.0)
    first = train(model, runs, tmp_path)
    for name in runs:
        alone = several("bart", dropout=0.0)
        losses = train(alone, {name: runs[name]}, tmp_path)[name].losses
        assert first[name].losses == pytest.approx(losses, abs=1e-12)


def test_a_method_is_saved_when_it_ends_and_no_step_moves_it_then(tmp_path):
    folder, seen = tmp_path / "b", []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(((folder / "pelt_config.json").exists(), tensors(model, "b")))

    runs = three_runs()
    runs["b"] = dataclasses.replace(runs["b"], folder=folder, weight_decay=0.5)
    model = several("bart")
    with pytest.MonkeyPatch.context() as patch:
        made = SeveralTrainer.__init__

        def watched(self, *args, **kwargs):
            made(self, *args, **kwargs)
            self.add_callback(Watch())

        patch.setattr(SeveralTrainer, "__init__", watched)
        results = train(model, runs, tmp_path)
    assert [saved for saved, _ in seen] == [False, False, True, True, True]
    check_equal(seen[-1][1], seen[2][1], atol=0)
    assert results["b"].folder == folder and results["b"].steps == 3 and not results["b"].stopped
    assert results["a"].folder is None and results["a"].steps == 5
    loaded = pelt_fast.load(plain("bart"), folder).eval()
    batch = collate(rows(3, 9))
    with torch.no_grad(), pelt_fast.route(model.eval(), "b"):
        torch.testing.assert_close(model(**batch).logits, loaded(**batch).logits)


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("name", [
    "lora", "mam", "houlsby", "bitfit", "prefix", "multi_head_parallel_adapter",
    "learned_scale_parallel_adapter", "pfeiffer",
])  # fmt: skip
def test_a_method_that_diverges_is_stopped_and_the_others_do_not_notice(name, tmp_path):
    names, folder = {"a": "lora_ffn", "d": name}, tmp_path / "d"
    runs = {"a": run(1), "d": run(4, learning_rate=1e150, schedule="constant", folder=folder)}
    model, without = several("bart", names), several("bart", names)
    results = train(model, runs, tmp_path)
    stopped = results["d"]
    assert stopped.stopped and 0 < stopped.steps < 5 and stopped.folder is None, stopped
    assert not folder.exists()
    assert all(t.isfinite().all() for t in tensors(model, "d").values())
    assert all(math.isfinite(loss) for loss in stopped.losses)
    expected = train(without, {"a": runs["a"]}, tmp_path)
    assert results["a"].stopped is None
    assert results["a"].losses == pytest.approx(expected["a"].losses, abs=1e-12)
    check_equal(tensors(model, "a"), tensors(without, "a"), atol=1e-10)


def test_a_method_whose_loss_is_too_large_is_stopped(tmp_path):
    runs = three_runs() | {"c": run(3, stop_above=1.0, folder=tmp_path / "c")}
    model = several("bart")
    before = tensors(model, "c")
    results = train(model, runs, tmp_path)
    assert results["c"].steps == 0 and results["c"].losses == []
    assert "the loss of step 1 was" in results["c"].stopped
    assert "above stop_above=1" in results["c"].stopped
    check_equal(tensors(model, "c"), before, atol=0)
    assert results["a"].steps == 5 and not (tmp_path / "c").exists()


def test_the_training_ends_with_the_last_method(tmp_path):
    runs = {"a": run(1, steps=2), "b": run(2, steps=50, stop_above=0.0)}
    results = train(several("bart"), runs, tmp_path, save_strategy="steps", save_steps=1)
    assert results["a"].steps == 2 and results["b"].steps == 0
    assert not (tmp_path / "out" / "checkpoint-3").exists()


def test_a_training_that_was_cut_ends_as_the_unbroken_one(tmp_path):
    runs = three_runs() | {"c": run(3, steps=2, stop_above=1.0)}
    model = several("bart")
    whole = train(model, runs, tmp_path / "whole")
    settings = dict(save_strategy="steps", save_steps=2)
    train(several("bart"), runs, tmp_path, **settings)
    for step in (2, 4):  # b trains, b has ended
        fresh, folder = several("bart"), tmp_path / "out" / f"checkpoint-{step}"
        resumed = train(fresh, runs, tmp_path / "on", resume_from_checkpoint=folder)
        assert resumed == whole
        for name in runs:
            check_equal(tensors(fresh, name), tensors(model, name), atol=0)
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["loss/a"] for entry in logs] == whole["a"].losses[:4]
    assert ["loss/b" in entry for entry in logs] == [True, True, True, False]
    assert logs[1]["learning_rate/a"] == pytest.approx(3e-3 / 2)  # cosine, two steps of warmup
    assert logs[1]["learning_rate/b"] == pytest.approx(3e-3 * 2 / 3)
    assert "learning_rate" not in logs[0]
    with pytest.raises(ValueError, match="is a checkpoint of a, b, c; runs has a"):
        train(several("bart"), {"a": runs["a"]}, tmp_path, resume_from_checkpoint=True)


def test_checkpoints_of_activations_change_nothing(tmp_path):
    runs = {name: dataclasses.replace(one, steps=2) for name, one in three_runs().items()}
    expected = train(several("bart"), runs, tmp_path)
    found = train(several("bart"), runs, tmp_path, gradient_checkpointing=True)
    for name in runs:
        assert found[name].losses == pytest.approx(expected[name].losses, abs=1e-12)


def test_what_the_training_leaves_behind(tmp_path):
    model = several("bart")
    routing = injection_of(model).routing
    train(model, {"b": run(2, steps=1)}, tmp_path)
    assert routing.generators == {} and routing.get() is None
    assert all(p.grad is None for p in model.parameters())
    assert pelt_fast.active(model) == {"a": 1.0}


def test_the_same_parameters_decay_as_alone(tmp_path):
    names = {"norm": "houlsby", "bias": "learned_scale_parallel_adapter", "x": "mam_glue"}
    model = several("roberta", names)
    alone = {key: pelt_fast.inject(plain("roberta"), method(name)) for key, name in names.items()}
    trainer = object.__new__(SeveralTrainer)
    for name, one in alone.items():
        own = {n for n, p in one.named_parameters() if p.requires_grad}
        expected = own & set(PeltTrainer.get_decay_parameter_names(trainer, one))
        trained = TrainedMethod(model, name, run(1))
        tree = as_alone(model, trained)
        assert set(PeltTrainer.get_decay_parameter_names(trainer, tree)) & own == expected
        assert trained.parameters.keys() == own


def cut_short(**changes) -> dict:
    return {"a": dataclasses.replace(run(1), **changes)}


NO_ROWS = pelt_fast.MethodRun([], 1e-3, 1)


@pytest.mark.parametrize("runs, error, message", [
    ({"x": run(1)}, ValueError, "no method is named 'x'; there are a, b, c"),
    ({}, ValueError, "runs must have a MethodRun for at least one method, got none"),
    ([run(1)], TypeError, "runs must be a dict of MethodRun by name, got list"),
    ({"a": dict(steps=1)}, TypeError, r"runs\['a'\] must be a MethodRun, got dict"),
    ({"a": NO_ROWS}, ValueError, r"runs\['a'\]: dataset must have at least one row, got none"),
    ({"a": pelt_fast.MethodRun(iter([]), 1e-3, 1)}, TypeError, "a length and an index, got list_iter"),
    (cut_short(steps=0), ValueError, r"runs\['a'\]: steps must be a whole number >= 1, got 0"),
    (cut_short(batch_size=2.0), ValueError, "batch_size must be a whole number >= 1, got 2.0"),
    (cut_short(warmup_steps=-1), ValueError, "warmup_steps must be a whole number >= 0, got -1"),
    (cut_short(learning_rate=math.inf), ValueError, "learning_rate must be a finite number >= 0, got inf"),
    (cut_short(learning_rate=-1.0), ValueError, "learning_rate must be a finite number >= 0, got -1.0"),
    (cut_short(max_grad_norm=math.nan), ValueError, "max_grad_norm must be a finite number >= 0, got nan"),
    (cut_short(stop_above="1"), ValueError, "stop_above must be a finite number >= 0, got '1'"),
    (cut_short(seed=None), ValueError, "seed must be a whole number, got None"),
    (cut_short(schedule="triangle"), ValueError, "schedule must be one of linear, .*; got 'triangle'"),
    (cut_short(schedule="constant", warmup_steps=1), ValueError, "use 'constant_with_warmup'"),
    (cut_short(schedule="polynomial", learning_rate=0.0), ValueError, "'polynomial' does not take learning_rate=0.0"),
    (cut_short(folder=3), TypeError, r"runs\['a'\]: folder must be a path, got int"),
    ({"a": run(1, folder="x"), "b": run(2, folder="./x")}, ValueError,
     r"runs\['b'\]: folder must be the run's own, got './x', which runs\['a'\] has as well"),
])  # fmt: skip
def test_runs_that_cannot_be(runs, error, message, tmp_path):
    model = several("bart")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        train(model, runs, tmp_path)
    assert not list(tmp_path.iterdir())
    check_equal(dict(model.named_parameters()), before, atol=0)


@pytest.mark.parametrize("given, message", [
    (dict(learning_rate=1e-3), r"learning_rate=0.001: each method has its own: give MethodRun\(learning_rate"),
    (dict(max_steps=3), r"give MethodRun\(steps=...\)"),
    (dict(gradient_accumulation_steps=2), "is not for several methods: a step is one batch"),
    (dict(fp16=True), "fp16=True is not for several methods: .*use bf16=True"),
    (dict(eval_strategy="epoch"), "evaluate each method afterwards"),
    (dict(optim="sgd"), "optim must be one of adamw_torch, adamw_torch_fused, got 'sgd'"),
])  # fmt: skip
def test_arguments_that_have_no_meaning(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(several("bart"), {"a": run(1)}, tmp_path, **given)


def test_models_that_cannot_be(tmp_path):
    runs = {"a": run(1)}
    one = pelt_fast.inject_named(plain("bart"), {"a": method("lora")})
    with pytest.raises(ValueError, match="together=True"):
        train(one, runs, tmp_path)
    model = several("bart")
    model.model.shared.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"shared\.weight trains and is no method's"):
        train(model, runs, tmp_path)
    model = several("bart")
    with pelt_fast.disabled(model), pytest.raises(RuntimeError, match="train_several in a block"):
        train(model, runs, tmp_path)
    for parameter in parameters_of_method(model, "a").values():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"runs\['a'\]: no parameter of the method trains"):
        train(model, runs, tmp_path)
