"""Write docs/integration.md: what an injected model goes through, each line run now. ``make parity``."""

import re
import subprocess
import sys
from pathlib import Path

import torch
import transformers

PAGE = Path(__file__).parents[2] / "docs" / "integration.md"
ROWS = [  # what, which tests
    ("torch.compile, fullgraph, changing shapes: no graph and no recompilation of ours",
     "tests/models/test_compile.py"),
    ("gradient checkpointing (reentrant too), accumulation, autocast, twenty steps of both paths",
     "tests/models/test_training.py"),
    ("transformers' Trainer: stopped and resumed bit for bit, the method alone written, best model",
     "tests/models/test_trainer.py"),
    ("killed with SIGKILL and resumed, no growth of memory", "tests/models/test_long_run.py"),
    ("DDP and FSDP2, two gloo processes: the losses of one, saved and resumed; a checkpoint in"
     " another world size", "tests/models/test_distributed.py"),
    ("`pelt-fast train` under accelerate's FSDP2: the losses of DDP, resumed, the base in no"
     " checkpoint", "tests/tasks/test_fsdp.py"),
    ("quantised bases (extra `quantised`): bitsandbytes nf4 and int8, torchao int8, int8 rows,"
     " GPTQ's packed layout",
     "tests/models/test_quantised.py"),
    ("packed sequences without padding", "tests/models/test_packed_sequences.py"),
    ("fused and transposed projections", "tests/models/test_parts.py"),
    ("the user's own layouts", "tests/models/test_slots.py"),
    ("generation with every cache and beams, prefixes and prompts", "tests/models/test_generate.py"),
    ("fp32 factors on a bf16 base", "tests/models/test_bf16.py"),
    ("Liger's and parametrized models, tied embeddings", "tests/models/test_composition.py"),
    ("several named methods in one model, one at work or a weighted sum",
     "tests/models/test_several.py"),
    ("TRL's SFTTrainer, padded and padding-free", "tests/models/test_trl.py"),
    ("prompts, by concatenation by hand", "tests/models/test_prompt.py"),
    ("PEFT's LoRA and prefix models on our ops and back", "tests/models/test_peft.py"),
    ("PEFT's files (LoRA, prefix, prompt), written and read", "tests/models/test_peft_files.py"),
    ("AdapterHub's files, read and written", "tests/models/test_adapterhub.py"),
    ("merge and unmerge", "tests/models/test_merge.py"),
    ("save and load; a full disk, a damaged file", "tests/models/test_checkpoint.py"),
    ("hostile files", "tests/models/test_hostile.py"),
    ("the hub: upload with a card, download", "tests/models/test_hub.py"),
    ("sdist and wheel, with and without a compiler", "tests/test_release.py"),
]  # fmt: skip
NOT_HERE = """Refused with the reason: weights sharded before inject (tensor-parallel plans of
transformers, `fully_shard` first). Not read: checkpoints of the paper's own code; their tensor names
are not documented. Not tried: a real GPTQ layer, float8 of torchao (they need a GPU).
"""


def outcome(path: str) -> tuple[str, bool]:
    """What pytest counts, and whether all of it holds."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", path],
        capture_output=True,
        text=True,
    )
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", ran.stdout)
    return ", ".join(f"{number} {word}" for number, word in counts), ran.returncode == 0


def main() -> int:
    lines, whole = [], True
    for what, path in ROWS:
        counts, holds = outcome(path)
        whole &= holds
        lines.append(
            f"| {what} | `pytest {path}` | {counts if holds else f'**FAILS**: {counts}'} |"
        )
        print(lines[-1], flush=True)
    head = (
        "# What an injected model goes through\n\nWritten by `make parity`, which ran every line"
        f" (torch {torch.__version__}, transformers {transformers.__version__}, CPU).\n\n"
        "| what | command | |\n|---|---|---|\n"
    )
    PAGE.write_text(head + "\n".join(lines) + f"\n\n{NOT_HERE}")
    return int(not whole)


if __name__ == "__main__":
    sys.exit(main())
