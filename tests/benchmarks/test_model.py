"""Whole models: every preset on every shape is right, counted and timed."""

import copy
import json

import pytest
import torch

from benchmarks import model, peers, text, whole
from benchmarks.memory import peak_growth, standing
from benchmarks.peers.plain_ops import as_plain
from benchmarks.record import Record
from pelt_fast import functional
from tests.models.judge import assert_near

from .tiny import WIDTHS, shape

PLAN = model.Plan(models=("tiny-bart",), rows=2, source=32, target=8, repeats=1)
EAGER = tuple(name for name in peers.PEERS if name != "compile")


@pytest.mark.parametrize("family", WIDTHS)
@pytest.mark.parametrize("name", ["mam", "lora_qv_ffn", "houlsby", "multi_head_parallel_adapter"])
def test_ours_plain_and_peft_are_one_function(name, family):
    verdicts = dict(model.judged(shape(family), model.methods()[name], PLAN, EAGER))
    assert {"pelt_fast", "plain PyTorch", "pelt_fast reference"} <= verdicts.keys()
    assert name != "lora_qv_ffn" or "PEFT" in verdicts
    assert not any(verdicts.values()), verdicts


def test_a_wrong_model_is_refused(monkeypatch):
    exact = functional.lora_linear
    monkeypatch.setattr(
        functional, "lora_linear", lambda *a, scale, **k: exact(*a, scale=1.01 * scale, **k)
    )
    verdicts = dict(
        model.judged(shape("bart"), model.methods()["lora"], PLAN, ["pelt_fast", "plain"])
    )
    assert "is off by" in verdicts["pelt_fast"]["refused"] and verdicts["plain PyTorch"] is None


def test_every_row_has_its_counts(tmp_path, tiny_shapes):
    record = Record("model", tmp_path)
    plan = model.Plan(
        **(vars(PLAN) | dict(methods=("mam", "lora", "prompt", "bitfit"), peers=EAGER))
    )
    model.run(plan, record, progress=False)
    written = json.loads(record.path.read_text())
    assert written["finished"]
    rows = {(r["method"], r["provider"]): r for r in model.rows(written["entries"])}
    ours, full, peft = (rows["lora", name] for name in ("pelt_fast", "full fine-tuning", "PEFT"))
    assert ours["trainable"] == peft["trainable"] < full["trainable"]
    assert ours["checkpoint_bytes"] < full["checkpoint_bytes"]
    assert ours["flops"] == peft["flops"] < full["flops"]
    assert full["saved_bytes"] > 0 and ours["standing_bytes"] < full["standing_bytes"]
    assert rows["mam", "plain PyTorch"]["saved_bytes"] > rows["mam", "pelt_fast"]["saved_bytes"]
    assert ("bitfit", "pelt_fast") in rows and ("bitfit", "plain PyTorch") not in rows
    assert rows["prompt", "PEFT"]["note"]
    table = model.report(written["entries"])
    assert table.count("full fine-tuning") == 4


def test_a_method_that_a_model_has_nothing_for_says_so(tmp_path, tiny_shapes):
    plan = model.Plan(**(vars(PLAN) | dict(models=("tiny-t5",), methods=("bitfit",))))
    (entry,) = model.run(plan, Record("model", tmp_path), progress=False)
    assert "no biases" in entry["skipped"]


def test_a_shape_without_a_row_says_so(tmp_path):
    plan = model.Plan(models=("qwen3-8b",), methods=("lora",), layers=1)
    (entry,) = model.run(plan, Record("model", tmp_path), progress=False)
    assert "no row for qwen3" in entry["skipped"]


@pytest.mark.parametrize("name", model.EQUAL)
def test_equal_shares_are_equal(name):
    import pelt_fast

    wide = shape("bart")
    plan = model.Plan(**(vars(PLAN) | dict(share=10.0)))
    with torch.device("meta"):
        injected = pelt_fast.inject(model.build(wide), model.sized(name, wide, plan))
    assert pelt_fast.count_parameters(injected).percent == pytest.approx(10, rel=0.1)


def test_lengths_are_those_of_the_text(tmp_path):
    path = tmp_path / "text.tsv"
    path.write_text("\n".join(f"{'word ' * n}\t{'sum ' * (n // 10)}" for n in (30, 40, 90, 200)))
    found = text.lengths(path)
    assert found == [(30, 3), (40, 4), (90, 9), (200, 20)]
    rows = text.batch(4, 64, 8, found)
    assert rows.amax(0).tolist() == [64, 8] and rows[:, 0].tolist()[:2] == [30, 40]
    path.write_text("too short")
    with pytest.raises(ValueError, match="no line of 24 words"):
        text.lengths(path)
    assert len(text.lengths()) > 100  # torch's own docstrings


def test_batches_have_the_lengths_and_count_real_tokens():
    made = model.made(shape("bart"), PLAN)
    (batch,) = whole.batches(made, 2, 32, 8, [(30, 4), (90, 9)], 1, "cpu")
    assert sorted(batch["attention_mask"].sum(1).tolist()) == [30, 32]
    assert whole.tokens(batch) == 62 + int((batch["labels"] != -100).sum())


def test_frozen_goes_back_to_the_embeddings_of_the_same_loss():
    made = model.made(shape("bart"), PLAN).eval()
    (batch,) = whole.batches(made, 2, 32, 8, [(30, 8), (90, 9)], 1, "cpu")
    frozen = whole.Trained("frozen", made, None, to_embeddings=True)
    loss = whole.loss_of(frozen, batch)
    assert loss.requires_grad
    same, exact = made(**batch).loss, copy.deepcopy(made).double()(**batch).loss
    assert_near(loss, same, exact)


def test_as_plain_gives_the_functions_back():
    before = functional.lora_linear
    with as_plain():
        assert functional.lora_linear is not before
    assert functional.lora_linear is before


def test_memory_of_a_step():
    grown = peak_growth(lambda: torch.ones(64 << 20).sum(), torch.device("cpu"))
    assert grown is None or grown > 200 << 20
    linear = torch.nn.Linear(8, 8, bias=False)
    assert standing(linear) == 3 * 8 * 8 * 4
    assert standing(linear.requires_grad_(False)) == 8 * 8 * 4
