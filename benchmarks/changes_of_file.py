"""How often a training step of MAM changes from one of our files to another, in the order run.

    python -m benchmarks.changes_of_file                  prints the table
    python -m benchmarks.changes_of_file --trace ffn      prints the files of one part in order
    python -m benchmarks.changes_of_file --check          exit 1 above a limit

The model is a BART of 1 + 1 layers, 32 wide, with the dropouts of its config, in training mode. A
call counts when its function is in pelt_fast or kernels; it is a change of file when the call
before it was of another file. Returns do not count. Every part has run twice before it is counted.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import pelt_fast

from .common import table

PACKAGE = Path(pelt_fast.__file__).resolve().parent
FOLDERS = (str(PACKAGE) + os.sep, str(PACKAGE.parent / "kernels") + os.sep)
ROWS, LENGTH, WIDTH = 2, 8, 32


@dataclass(frozen=True)
class Part:
    """A part of the step: its name in the table, and its limits for changes and files."""

    title: str
    changes: int
    files: int | None = None


PARTS = {
    "ffn": Part("a widened-FFN site, forward", 14, 8),
    "prefix": Part("a prefix site, forward", 12, 8),
    "forward": Part("the whole model, forward", 90),
    "backward": Part("the whole model, backward", 50),
}


@dataclass(frozen=True)
class Walk:
    """The files of one part in the order of the calls; two neighbours always differ."""

    visits: tuple[str, ...]

    @property
    def changes(self) -> int:
        """Changes of file; the first file is one."""
        return len(self.visits)

    @property
    def files(self) -> int:
        """Different files."""
        return len(set(self.visits))

    def within(self, part: Part) -> bool:
        """Whether the walk keeps the limits of its part."""
        return self.changes <= part.changes and (part.files is None or self.files <= part.files)


def walk(work: Callable[[], object]) -> Walk:
    """Run ``work`` and follow its calls, on this thread."""
    visits: list[str] = []

    def profile(frame, event, _):
        if event != "call":
            return
        name = _ours(frame.f_code.co_filename)
        if name is not None and (not visits or visits[-1] != name):
            visits.append(name)

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return Walk(tuple(visits))


def _ours(path: str) -> str | None:
    """The file within the checkout; None of a file that is not ours."""
    path = os.path.realpath(path)
    if not path.startswith(FOLDERS):
        return None
    return str(Path(path).relative_to(PACKAGE.parent))


def mam_on_bart() -> nn.Module:
    """The tiny BART with MAM, in training mode."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=WIDTH, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    return pelt_fast.inject(BartForConditionalGeneration(config), "mam").train()


def measure() -> dict[str, Walk]:
    """The walk of every part."""
    model = mam_on_bart()
    adapter, attend = _ffn_site(model), _prefix_site(model)
    ids = torch.randint(3, 60, (ROWS, LENGTH))
    hidden = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    loss: list[torch.Tensor] = []

    def forward():
        loss[:] = [model(input_ids=ids, labels=ids).loss]

    def backward():
        loss[0].backward()

    work = {
        "ffn": lambda: adapter(hidden),
        "prefix": attend,
        "forward": forward,
        "backward": backward,
    }
    for _ in range(2):  # work that is done only once is not a part of a step
        for run in work.values():
            run()
    return {name: walk(run) for name, run in work.items()}


def _prefix_site(model: nn.Module) -> Callable[[], object]:
    """The call of the first attention's function, in a forward of its stack that has begun."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    encoder = model.model.encoder
    attention = encoder.layers[0].self_attn
    function = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    heads = [torch.randn(ROWS, 2, LENGTH, WIDTH // 2, requires_grad=True) for _ in range(3)]
    bank = next(m for name, m in encoder.named_children() if name.startswith("pelt_"))
    bank.before_stack()
    return lambda: function(attention, *heads, None, dropout=0.0, scaling=attention.scaling)


def _ffn_site(model: nn.Module) -> nn.Module:
    """The first widened-FFN site."""
    from pelt_fast.modules import ParallelFFNAdapter

    return next(module for module in model.modules() if isinstance(module, ParallelFFNAdapter))


def report(walks: dict[str, Walk]) -> str:
    """The table: what was found, and the limits."""
    rows = []
    for name, found in walks.items():
        part = PARTS[name]
        most = f"{part.changes}" if part.files is None else f"{part.changes} / {part.files}"
        verdict = "met" if found.within(part) else "MISSED"
        rows.append([name, part.title, str(found.changes), str(found.files), most, verdict])
    return table(["part", "of MAM on BART", "changes of file", "files", "at most", ""], rows)


def trace(found: Walk) -> str:
    """The files in order, a line each, then how often each is entered."""
    counts = {name: found.visits.count(name) for name in found.visits}
    often = sorted(counts.items(), key=lambda item: -item[1])
    lines = [f"{i:>4}  {name}" for i, name in enumerate(found.visits, 1)]
    lines += ["", *(f"{count:>4} x {name}" for name, count in often)]
    return "\n".join(lines)


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", choices=PARTS, help="the files of this part, in order")
    parser.add_argument("--check", action="store_true", help="exit 1 where a limit is missed")
    options = parser.parse_args()
    walks = measure()
    if options.trace is not None:
        print(trace(walks[options.trace]) + "\n")
    print(report(walks))
    missed = [name for name, found in walks.items() if not found.within(PARTS[name])]
    return int(options.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
