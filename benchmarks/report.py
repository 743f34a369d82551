"""Write the tables of README.md and docs/ from the newest committed result files.

python -m benchmarks.report            rewrites what stands between the markers
python -m benchmarks.report --check    exit 1 when a page is not what the results say
"""

import argparse
import re
import sys
from collections.abc import Callable

import torch

from benchmarks import decode, demo, lora_linear, traffic
from benchmarks.common import REPOSITORY, newest
from pelt_fast import PeltConfig, inject
from pelt_fast.methods import formula, methods
from tests.small import MODELS

README = REPOSITORY / "README.md"
PAGES = (README, REPOSITORY / "docs" / "traffic.md")


def _measured(result: dict, text: str) -> str:
    """A table and where its numbers are from."""
    machine = result["machine"]
    versions = machine["versions"]
    source = (
        f"{machine['device']}; torch {versions['torch']}, transformers"
        f" {versions['transformers']}, PEFT {versions['peft']}; commit {machine['commit']},"
        f" {machine['time'][:10]}"
    )
    return f"{text}\n\n*{source}*"


def _demo() -> str:
    result = newest("demo")
    return _measured(
        result, demo.report(result["rows"], result["step_seconds"], result["saved_bytes"])
    )


def _lora() -> str:
    result = newest("lora-linear")
    return _measured(result, lora_linear.report(result["seconds"]))


def _decode() -> str:
    result = newest("decode")
    return _measured(result, decode.report(result["seconds"]))


def _methods() -> str:
    rows = []
    for name, config in methods().items():
        parts = [
            f"{m.insertion} {m.form} on {m.target}, {m.composition}"
            + (f" s={m.scale:g}" if m.composition == "scaled" else "")
            + (f", {m.size}" if m.size else "")
            for m in config.modifications
        ]
        formulas = " + ".join(dict.fromkeys(formula(m) for m in config.modifications))
        rows.append(
            [f"`{name}`", "; ".join(parts) or "the task head alone", formulas, _where(config)]
        )
    header = ["method", "modifications", "parameters", "not on"]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _traffic() -> str:
    result = newest("traffic")
    rows = [traffic.Passes(r["subject"], r["provider"], r["forward"], r["backward"])
            for r in result["rows"]]  # fmt: skip
    return _measured(result, traffic.report(rows))


def _where(config: PeltConfig) -> str:
    """The architectures of the parity suite that a method is refused on, and why."""
    reasons: dict[str, list[str]] = {}
    for architecture, make in MODELS.items():
        with torch.device("meta"):
            model = make()
        try:
            inject(model, config if config.is_full else config.replace(size=4))
        except ValueError as error:
            reason = str(error).replace(type(model).__name__, "it")
            reasons.setdefault(reason, []).append(architecture)
    return "; ".join(f"{', '.join(found)} ({reason})" for reason, found in reasons.items())


SECTIONS: dict[str, Callable[[], str]] = {
    "methods": _methods, "demo": _demo, "lora": _lora, "decode": _decode, "traffic": _traffic,
}  # fmt: skip


def render(text: str) -> str:
    """``text`` with every section between its markers made anew."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            continue
        body = f"{begin}\n{section()}\n{end}"
        text = pattern.sub(lambda match, body=body: body, text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    pages = {page: page.read_text() for page in PAGES}
    after = {page: render(text) for page, text in pages.items()}
    if options.check:
        return int(pages != after)
    for page, text in after.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
