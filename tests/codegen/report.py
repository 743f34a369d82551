"""Compile everything for one target and write what came out: ``python -m tests.codegen.report``.

``--target T --json FILE`` compiles one target; without arguments all of them, into
docs/codegen.md. In its own process: a kernel that was interpreted cannot be compiled.
"""

import argparse
import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .digest import digest
from .limits import problems

DOCS = Path(__file__).parents[2] / "docs" / "codegen.md"
TARGETS = ("sm80", "sm90", "sm100", "gfx942")


def compile_target(target: str, only: str = "", every: int = 1) -> Iterator[dict]:
    """A row for each kernel that the launches of ``target`` make, equal ones once; of ``every``
    launches of one launcher the first."""
    from . import aot
    from .launches import launches

    seen, passed = set(), collections.Counter()
    for launch in launches(target):
        launcher = launch.name.split()[0]
        passed[launcher] += 1
        if (passed[launcher] - 1) % every or not re.search(only, launch.name):
            continue
        for machine in aot.machines_of(launch.call, target):
            row = dataclasses.asdict(machine)
            text = row.pop("assembly")
            key = hash(text)
            if key in seen:
                continue
            seen.add(key)
            yield {"launch": launch.name, "streaming": launch.streaming, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="launches whose name matches")
    parser.add_argument(
        "--every", type=int, default=1, help="of so many launches of a launcher the first"
    )
    options = parser.parse_args()
    if options.target:
        rows = []
        for row in compile_target(options.target, options.only, options.every):
            print(line(row), flush=True)
            rows.append(row)
        if options.json:
            options.json.write_text(json.dumps(rows, default=str))
        return
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda target: collect(target, Path(folder)), TARGETS)
        rows = dict(zip(TARGETS, found))
    _, section, others = DOCS.read_text().partition("<!-- ")  # what other commands write
    DOCS.write_text(markdown(rows).rstrip() + "\n" + (f"\n{section}{others}" if section else ""))
    print(f"wrote {DOCS}")
    wrong = [
        f"{target}: {row['kernel']} of {row['launch']}: {'; '.join(claims)}"
        for target, found in rows.items()
        for row in found
        if (claims := problems(target, row))
    ]
    if wrong:
        sys.exit("\n".join(wrong))


def collect(target: str, folder: Path, every: int = 1) -> list[dict]:
    """The rows of one target, compiled in a process of its own."""
    path = folder / f"{target}.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "tests.codegen.report",
        "--target",
        target,
        "--json",
        str(path),
        "--every",
        str(every),
    ]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{target} did not compile:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}")
    return json.loads(path.read_text())


def line(row: dict) -> str:
    """One line of the log."""
    c = row["counts"]
    return (
        f"{row['target']:<7}{row['kernel']:<26}{row['launch']:<48} reg {row['registers']:>3}"
        f" spill {row['spills']:>3} smem {row['shared']:>6} wgmma {c['wgmma']:>3} mma {c['mma']:>4}"
        f" 128-bit {c['wide']:>3}/{c['wide'] + c['narrow']:>3}"
    )


def markdown(rows: dict[str, list[dict]]) -> str:
    """The page: a table for each target, the worst launch of each kernel and dtype."""
    import triton

    out = [
        "# What the kernels compile to", "",
        f"Triton {triton.__version__}, no GPU: `python -m tests.codegen.report`. Each kernel and"
        " dtype over all its launches: the most registers a thread and the most shared memory, tensor"
        " core instructions of the launch that has most, 16-byte global accesses beside the others."
        f" Digest of the sources: `{digest()}`.",
        "",
    ]  # fmt: skip
    for target, everything in rows.items():
        table = [row for row in everything if not row["launch"].startswith(("ugly", "huge"))]
        out += [
            f"## {target}", "",
            "| kernel | dtype | binaries | registers | spills | shared, bytes | wgmma | mma | 16-byte / other |",
            "|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        groups: dict[tuple, list[dict]] = {}
        for row in table:
            groups.setdefault((row["kernel"], row["dtype"]), []).append(row)
        for (kernel, dtype), group in groups.items():
            most = {
                key: max(row[key] for row in group) for key in ("registers", "spills", "shared")
            }
            counts = [row["counts"] for row in group]
            out.append(
                f"| {kernel} | {dtype} | {len(group)} | {most['registers']} | {most['spills']} |"
                f" {most['shared']:,} | {max(c['wgmma'] for c in counts)} |"
                f" {max(c['mma'] for c in counts)} | {sum(c['wide'] for c in counts)} /"
                f" {sum(c['narrow'] for c in counts)} |"
            )
        out.append("")
    return "\n".join(out)


if __name__ == "__main__":
    main()
