"""transformers' Trainer: an interrupted run ends as an unbroken one, and writes the method alone."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import pelt_fast
from pelt_fast.integrations.trainer import PeltTrainer
from tests.small import MODELS, VOCABULARY

LENGTH, ROWS, STEPS = 8, 48, 12


class Rows(torch.utils.data.Dataset):
    """Token ids whose first says the label."""

    def __init__(self, classes: bool):
        ids = torch.randint(
            4, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(7)
        )
        self.rows = [{"input_ids": row, "labels": row[0] % 3 if classes else row} for row in ids]

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> dict:
        return self.rows[i]


class StopAt(TrainerCallback):
    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = (
            state.global_step == self.step or control.should_training_stop
        )


def trainer(architecture, method, folder, stop=None, **more) -> PeltTrainer:
    torch.manual_seed(0)
    model = MODELS[architecture](dropout=0.1)
    pelt_fast.inject(model, pelt_fast.methods()[method].replace(size=5))
    settings = dict(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=8, learning_rate=1e-2,
        save_strategy="steps", save_steps=5, logging_steps=1, report_to=[], seed=3,
        disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True,
    )  # fmt: skip
    data = Rows(classes=architecture in ("bert", "roberta"))
    return PeltTrainer(
        model=model, args=TrainingArguments(**(settings | more)), train_dataset=data,
        eval_dataset=data, callbacks=[StopAt(stop)],
    )  # fmt: skip


def losses(run: PeltTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def trained(model) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("architecture, method", [
    ("bart", "mam"), ("roberta", "prefix"), ("llama", "lora"), ("bert", "bitfit"),
])  # fmt: skip
def test_a_run_that_was_stopped_ends_as_the_unbroken_one(architecture, method, tmp_path):
    whole = trainer(architecture, method, tmp_path / "whole")
    whole.train()
    trainer(architecture, method, tmp_path / "cut", stop=5).train()
    resumed = trainer(architecture, method, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)  # dropout masks and all
    ends = trained(resumed.model), trained(whole.model)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert losses(whole)[-1] < losses(whole)[0]


def test_a_checkpoint_is_the_method_and_loads_into_a_fresh_base(tmp_path):
    run = trainer("bart", "mam", tmp_path)
    run.train()
    folder = tmp_path / "checkpoint-10"
    names = {path.name for path in folder.iterdir()}
    assert {"pelt_model.safetensors", "pelt_config.json", "pelt_training.safetensors",
            "optimizer.pt", "trainer_state.json"} <= names  # fmt: skip
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    method = sum(p.numel() for p in trained(run.model).values())
    for name in ("pelt_model.safetensors", "pelt_training.safetensors"):
        assert Path(folder / name).stat().st_size < 4 * method + 20_000
    run.save_model(tmp_path / "end")
    torch.manual_seed(0)
    loaded = pelt_fast.load(MODELS["bart"](dropout=0.1), tmp_path / "end").eval()
    ids = Rows(False)[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, run.model.eval()(ids).logits, atol=1e-6)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    run = trainer(
        "roberta", "lora", tmp_path, load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=5, metric_for_best_model="eval_loss", greater_is_better=True,  # the worst
    )  # fmt: skip
    run.train()
    evaluated = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    assert run.state.best_metric == max(evaluated.values())
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-5)


def test_a_checkpoint_of_another_method_or_none_is_refused(tmp_path):
    trainer("roberta", "lora", tmp_path).train()
    with pytest.raises(ValueError, match="does not fit this model: it lacks"):
        trainer("roberta", "prefix", tmp_path).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-10" / "pelt_training.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"pelt_training\.safetensors is missing"):
        trainer("roberta", "lora", tmp_path).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-10")
        )


@pytest.mark.parametrize("method", [name for name in pelt_fast.methods() if name != "full"])
@pytest.mark.parametrize("layer_norm", ["in", "out"])
def test_matrices_are_decayed_and_norms_biases_and_learned_scales_are_not(
    method, layer_norm, tmp_path
):
    config = pelt_fast.methods()[method]
    changes = dict(layer_norm=layer_norm, composition="learned_scale")
    modifications = tuple(
        dataclasses.replace(m, **changes) if (m.form, m.target) == ("bottleneck", "ffn") else m
        for m in config.modifications
    )
    bottleneck = modifications != config.modifications
    config = dataclasses.replace(config, modifications=modifications)
    model = pelt_fast.inject(MODELS["roberta"](), config)
    run = PeltTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    decayed = set(run.get_decay_parameter_names(model))
    ours = {n: p for n, p in model.named_parameters() if "pelt_" in n}
    assert {n for n, p in ours.items() if p.dim() > 1} == decayed & ours.keys()
    assert not bottleneck or any(".norm." in name for name in ours)
    plain = set(Trainer.get_decay_parameter_names(run, model)) & ours.keys()
    assert {n.rpartition(".")[2] for n in plain - decayed} <= {"scale"}


def test_backward_runs_in_the_calling_thread(tmp_path, monkeypatch):
    """On a GPU: autograd's own thread costs each of our ops time on the host."""
    seen = []
    step = Trainer.training_step

    def noted(self, *args, **kwargs):
        seen.append(torch._C._is_multithreading_enabled())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", noted)
    trainer("llama", "lora", tmp_path, stop=2).train()
    assert seen and not any(seen) and torch._C._is_multithreading_enabled()
