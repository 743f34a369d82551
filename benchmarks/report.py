"""Write tables and figures of README.md and docs/ from the newest committed result files, and the
table of line counts from its page.

python -m benchmarks.report            rewrites the text between the markers, draws the figures
python -m benchmarks.report --check    exit 1 when a page differs from the results
"""

import argparse
import re
import sys
from collections.abc import Callable

import torch

from benchmarks import (
    decode,
    demo,
    figures,
    layer,
    line_counts,
    model,
    predict,
    profile,
    several,
    targets,
    traffic,
)
from benchmarks.common import (
    REPOSITORY,
    kind_of_machine,
    merged,
    newest,
    newest_of_each_kind,
    not_superseded,
    parts,
    table,
)
from benchmarks.gpu import report as gpu_report
from pelt_fast import PeltConfig, inject
from pelt_fast.presets import formula, methods
from pelt_fast.testing.models import MODELS

DOCS = REPOSITORY / "docs"
README = REPOSITORY / "README.md"
PAGES = (
    README,
    *(DOCS / f"{name}.md" for name in ("quickstart", "methods", "traffic", "performance", "gpu")),
    line_counts.PAGE,
)
HEADLINE = "model-bart-768"
SHOWN = ("mam", "lora_qv_ffn", "scaled_parallel_adapter", "houlsby", "prefix", "prompt", "bitfit")
COMPARED = ("pelt_fast", "plain PyTorch", "PEFT")
# numbers of the notes below README's table
FOOTNOTES = {("prefix", "PEFT"): " (1)", ("houlsby", "pelt_fast"): " (2)"}
FIGURES = ("layer-bart-large", HEADLINE, "equal", "several", "traffic", "predict-h200")


def _measured(result: dict, text: str) -> str:
    """A table and where its numbers are from."""
    return f"{text}\n\n{_source(result)}"


def _source(result: dict) -> str:
    machine = result["machine"]
    versions = machine["versions"]
    return (
        f"*{machine['device']}; torch {versions['torch']}, transformers"
        f" {versions['transformers']}, PEFT {versions['peft']}; commit {machine['commit']},"
        f" {machine['time'][:10]}*"
    )


def _newest(part: str, table_of: Callable[[dict], str]) -> str:
    """The newest table of a part on each kind of machine."""
    found = newest_of_each_kind(part)
    return "\n\n".join(_measured(result, table_of(result)) for result in found)


def _demo() -> str:
    return _newest("demo", lambda r: demo.report(r["rows"], r["step_seconds"], r["saved_bytes"]))


def _layers() -> str:
    return _each("layer-", layer.report)


def _each(start: str, table_of: Callable[[list[dict]], str]) -> str:
    """The tables of all parts whose names begin with ``start``."""
    found = [result for part in parts(start) for result in not_superseded(part)]
    return "\n\n".join(_measured(result, table_of(result["entries"])) for result in found)


def _cost() -> str:
    """README's: a step of each method, ours and the peers', to the frozen model and to full
    fine-tuning. A table for each kind of machine."""
    kinds: dict[str, list[dict]] = {}
    for result in not_superseded(HEADLINE):
        kinds.setdefault(kind_of_machine(result["machine"]), []).append(result)
    return "\n\n".join(map(_cost_of, kinds.values()))


def _cost_of(results: list[dict]) -> str:
    """The table of one kind of machine."""
    shown = [(r, [e for e in r["entries"] if e["method"] in SHOWN]) for r in results]
    rows: dict[str, dict[str, dict]] = {}
    for row in model.rows([entry for _, entries in shown for entry in entries]):
        rows.setdefault(row["method"], {})[row["provider"]] = row
    lines = [_cost_line(method, rows[method]) for method in SHOWN if method in rows]
    header = [
        f"method, on {HEADLINE.removeprefix('model-')}",
        *COMPARED,
        "step / full",
        "peak / full",
    ]
    return "\n\n".join([table(header, lines), *(_source(r) for r, entries in shown if entries)])


def _cost_line(method: str, found: dict[str, dict]) -> list[str]:
    """One method: each provider's step to the frozen model, and ours to full fine-tuning."""
    times = [
        f"{found[p]['to_frozen'][1]:.2f}{FOOTNOTES.get((method, p), '')}" if p in found else ""
        for p in COMPARED
    ]
    ours = found["pelt_fast"]
    return [f"`{method}`", *times, f"{ours['to_full'][1]:.2f}", f"{ours['peak_to_full']:.2f}"]


def _models() -> str:
    return _each("model-", model.report)


def _equal() -> str:
    return _newest("equal", lambda result: model.report(result["entries"]))


def _several() -> str:
    return _newest("several", lambda result: several.report(result["entries"]))


def _profile() -> str:
    return _newest("profile", lambda result: profile.report(result["entries"]))


def _predicted() -> str:
    result = newest("predict-h200")
    return _measured(result, predict.report(result["entries"]))


def _targets() -> str:
    found = targets.all_targets()
    lines = [[t.what, t.wanted, t.found, "met" if t.met else "MISSED"] for t in found]
    return table(["target", "wanted", "found", ""], lines)


def _commands() -> str:
    """The command and the commit of each table on the page."""
    alone = "equal", "several", "profile", "predict-h200", "traffic"
    names = *parts("model-"), *parts("layer-"), *alone
    rows = [[part, f"`{result['machine']['command']}`", result["machine"]["commit"]]
            for part in names for result in not_superseded(part)]  # fmt: skip
    return table(["part", "command", "commit in the file's name"], rows)


def _decode() -> str:
    return _newest("decode", lambda result: decode.report(result["seconds"]))


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
    return _measured(result, traffic.report(result["entries"]))


def _gpu_layers() -> str:
    return "\n\n".join(_measured(*found) for found in gpu_report.layers_by_file())


def _gpu_models() -> str:
    return "\n\n".join(_measured(*found) for found in gpu_report.models_by_file())


def _line_counts() -> str:
    return line_counts.table(line_counts.PAGE.read_text())


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
    "methods": _methods, "demo": _demo, "cost": _cost, "decode": _decode, "traffic": _traffic,
    "targets": _targets, "layers": _layers, "models": _models, "equal": _equal,
    "several": _several, "profile": _profile, "predicted": _predicted, "commands": _commands,
    "gpu-proof": gpu_report.proof, "gpu-layers": _gpu_layers, "gpu-models": _gpu_models,
    "line counts": _line_counts,
}  # fmt: skip


def render(text: str) -> str:
    """``text`` with every section between its markers written again."""
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
    for part in FIGURES:
        figures.draw_entries(part, merged(part), DOCS / "figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
