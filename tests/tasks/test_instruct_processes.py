"""The task instruct on two processes: DDP and accelerate's FSDP2 give the same scores, the first
process writes, and a plain model takes the method."""

import json

import pytest
from transformers import AutoModelForCausalLM, Trainer

import pelt_fast
from pelt_fast.tasks.instruct.generations import FILE
from pelt_fast.tasks.meter import LOG
from tests.tasks import chat
from tests.tasks.two_processes import fsdp2, run

pytest.importorskip("trl")


def trained(folder, model: str, data, environment: dict) -> tuple[list[float], int]:
    """The losses of the evaluations, and how many generations were written."""
    arguments = ["train", "--task", "instruct", "--data", str(data), "--model", model, "--steps",
                 "4", "--max-length", "32", "--batch-size", "1", "--accumulation", "1",
                 "--evaluate-every", "2", "--max-generated", "4", "--output", str(folder),
                 "--set", "dropout=0.0", "--learning-rate", "0.01"]  # fmt: skip
    run(Trainer, environment, arguments)
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return losses, len((folder / FILE).read_text().splitlines())


@pytest.mark.quick(every=0)
def test_fsdp2_trains_as_ddp_and_the_first_process_writes(tmp_path):
    model = chat.model_folder(tmp_path / "model")
    rows = [*chat.ROWS["messages"], {"messages": chat.said("say more", "eeeeee")}]  # an odd number
    data = chat.write(tmp_path / "data", rows, repeat=4)
    wanted, spoken = trained(tmp_path / "ddp", model, data, {})
    assert len(wanted) == 3 and wanted[2] < wanted[1] and spoken == 12
    found, spoken = trained(tmp_path / "fsdp", model, data, fsdp2("LlamaDecoderLayer"))
    assert found == pytest.approx(wanted, rel=1e-4) and spoken == 12
    for folder in ("ddp", "fsdp"):
        assert len((tmp_path / folder / "results.jsonl").read_text().splitlines()) == 1
        pelt_fast.load(AutoModelForCausalLM.from_pretrained(model), tmp_path / folder)
