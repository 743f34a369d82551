"""Whole training steps in bf16: BART-large with MAM first, then the others."""

from dataclasses import replace

import torch

from benchmarks import model, peers
from benchmarks.bench import quiet
from benchmarks.record import Record

HEADLINE = model.Plan(
    models=("bart-large",), methods=("mam", "lora_qv_ffn", "scaled_parallel_adapter"), rows=16,
    source=512, target=128, dtype=torch.bfloat16, device="cuda", peers=peers.QUICK,
)  # fmt: skip
# one layer of an 8 B model with its embeddings: full fine-tuning fits into memory, too
BLOCK = replace(HEADLINE, models=("llama-3-8b",), methods=("lora_qv_ffn", "mam"), layers=1, rows=4)
REST = replace(HEADLINE, models=("roberta-large", "t5-large"), methods=("mam", "lora"))
TARGETS = {"step": 0.78, "peak": 0.5}


def run(record: Record, device: torch.device, plans: tuple[model.Plan, ...] = ()) -> int:
    """Run the most important first; list the rest if the time is over."""
    quiet()
    for plan in plans or (HEADLINE, BLOCK, REST):
        model.run(plan, record, progress=False)
    print(model.report(record.entries))
    for row in model.rows(record.entries):
        if row["method"] == "mam" and row["provider"] == "pelt_fast" and "to_full" in row:
            found = {"step": row["to_full"][1], "peak": row["peak_to_full"]}
            verdicts = [f"{name} {found[name]:.2f} of full fine-tuning's, wanted {bound:.2f}"
                        for name, bound in TARGETS.items()]  # fmt: skip
            print(f"{row['model']} MAM: {'; '.join(verdicts)}")
    return 0
