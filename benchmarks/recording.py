"""Every benchmark that README and docs quote, recorded at one commit, a part at a time.

    make record                     runs what this commit and this kind of machine have not recorded
    make record PART="decode edges" only these parts
    make record PART=--list         lists the parts

Each command writes its own result file and takes at most half an hour on two cores. A run that was
stopped goes on with the first part that has no finished file. Nothing is recorded of a changed tree
or on a busy machine (``doubts``). The study and the page of architectures have commands of their
own (``benchmarks.study``, ``benchmarks.architectures``), ``make gpu`` has its parts.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass

from . import doubts
from .common import REPOSITORY, check_names, kind_of_machine, load, machine, paths_of

BENCH = ("benchmarks.bench",)
PEERS = ("--peer", "frozen", "full", "pelt_fast", "plain", "peft")
# a third of the presets each: a whole table takes longer than half an hour
METHODS = (
    ("mam", "lora_qv_ffn", "scaled_parallel_adapter", "lora", "houlsby", "prefix", "prompt"),
    ("bitfit", "pfeiffer", "lora_ffn", "prefix_nomlp", "prefix_lora_ffn", "mam_glue",
     "parallel_adapter_ffn"),
    ("parallel_adapter_attn", "parallel_attn_parallel_ffn", "learned_scale_parallel_adapter",
     "multi_head_parallel_adapter", "prefix_ungated", "linear_probe"),
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One command: the part of the result file that it writes, the module and its arguments, and
    the methods that it measures, if others measure more of the part."""

    part: str
    command: tuple[str, ...]
    methods: tuple[str, ...] = ()

    def is_done(self, results: list[dict]) -> bool:
        """Whether one of the part's results is finished and has the step's methods."""
        return any(
            result.get("finished", True)
            and {e.get("method") for e in result.get("entries", [])}.issuperset(self.methods)
            for result in results
        )


def _models(name: str, methods: tuple[str, ...], *more: str) -> Step:
    command = (*BENCH, "model", "--model", name, "--repeats", "5", *PEERS, *more, "--method")
    return Step(f"model-{name}", (*command, *methods), methods)


STEPS = (
    Step("layer-cpu", ("benchmarks.cpu",)),
    *(_models("bart-768", methods) for methods in METHODS),
    *(_models(name, ("mam", "lora_qv_ffn"), "--layers", "2")
      for name in ("llama-768", "roberta-base", "t5-base")),
    Step("layer-bart-large", (
        *BENCH, "layer", "--quick", "--model", "bart-large", "--peer", "frozen", "pelt_fast",
        "plain", "compile", "peft", "concatenation", "flex", "liger", "unsloth",
    )),
    Step("layer-llama-768", (*BENCH, "layer", "--quick", "--model", "llama-768")),
    Step("equal", (
        *BENCH, "model", "--model", "bart-768", "--share", "1", "--repeats", "5", *PEERS,
    )),
    Step("several", (
        *BENCH, "model", "--method", "lora", "mam", "--several", "2", "4", "8", "16", "32",
        "--repeats", "7",
    )),
    Step("decode", ("benchmarks.decode",)),
    Step("profile", ("benchmarks.profile",)),
    Step("scale", (*BENCH, "scale")),
    Step("edges", (*BENCH, "edges")),
    Step("demo", ("benchmarks.demo",)),
    Step("traffic", (*BENCH, "traffic")),
    Step("predict-h200", (*BENCH, "predict")),
)  # fmt: skip


def recorded(part: str, about: dict) -> list[dict]:
    """The results of a part at the commit and on the kind of machine of ``about``."""
    try:
        results = [load(path) for path in paths_of(part)]
    except FileNotFoundError:
        return []

    def origin(machine: dict) -> tuple[str, str]:
        return machine["commit"], kind_of_machine(machine)

    return [result for result in results if origin(result["machine"]) == origin(about)]


def chosen(names: list[str]) -> list[Step]:
    """The steps of the parts ``names``, all without any. ValueError lists the parts."""
    check_names("part", names, dict.fromkeys(step.part for step in STEPS))
    return [step for step in STEPS if not names or step.part in names]


def run(steps: list[Step]) -> int:
    """Run what is not done; the exit status of the first command that fails."""
    about = machine()
    for step in steps:
        if step.is_done(recorded(step.part, about)):
            print(f"{step.part}: recorded at {about['commit']}", flush=True)
            continue
        print(f"{step.part}: python -m {' '.join(step.command)} --record", flush=True)
        command = [sys.executable, "-m", *step.command, "--record"]
        status = subprocess.run(command, cwd=REPOSITORY).returncode
        if status:
            return status
    return 0


def main(given: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make record", description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--list", action="store_true", help="list the parts and what is recorded")
    options = parser.parse_args(given)
    try:
        steps = chosen(options.part)
        if not options.list:
            doubts.check()
    except ValueError as error:
        parser.error(str(error))
    if not options.list:
        return run(steps)
    about = machine()
    for step in steps:
        done = "recorded" if step.is_done(recorded(step.part, about)) else "open"
        print(f"{step.part:<18} {done:<9} {' '.join(step.command)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
