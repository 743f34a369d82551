"""The accelerate section of docs/how-to/with-other-libraries.md as a script that accelerate launches.

On a CPU ``accelerate launch`` starts one process; tests/tasks and tests/models train in several.
"""

import subprocess
import sys

import torch

import pelt_fast
from pelt_fast.formats.checkpoint import read_config
from tests.docs import tiny
from tests.docs.blocks import ROOT, blocks_of
from tests.small import llama

PAGE = ROOT / "docs" / "how-to" / "with-other-libraries.md"
LAUNCH = ("accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
END = 'pelt_fast.save(accelerator.unwrap_model(prepared), "trained")\n'


def test_the_section_trains_under_accelerate_launch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.chat("my-llm")
    shown = [block.code for block in blocks_of(PAGE.read_text()) if block.reason is None]
    first = next(code for code in shown if "AutoTokenizer.from_pretrained" in code)
    batch = next(code for code in shown if "batch = tokenizer(" in code)
    section = next(code for code in shown if "Accelerator()" in code)
    (tmp_path / "train.py").write_text(first + batch + section + END)
    command = [sys.executable, "-m", *LAUNCH, "train.py"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = read_config("trained")[0]
    assert config == pelt_fast.lora(r=8, alpha=16)
    model = pelt_fast.load(type(llama()).from_pretrained("my-llm"), "trained")
    moved = [p for name, p in model.named_parameters() if name.endswith("lora_b")]
    assert moved and all(torch.count_nonzero(p) for p in moved)  # it began at zero
