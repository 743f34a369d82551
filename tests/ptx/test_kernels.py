"""Our kernels on the machine: a few tests of each, for sm_80 and sm_90, in every order.

``make emulate`` runs all of them. A process of its own: here the kernels are interpreted.
"""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from pelt_fast import kernels

from .emulate import read
from .plugin import ORDERS

ROOT = Path(__file__).parents[2]


def every_kernel() -> set[str]:
    """The names of what kernels/ launches."""
    names = [m.name for m in pkgutil.iter_modules(kernels.__path__, "pelt_fast.kernels.")]
    held = [item for name in names for item in vars(importlib.import_module(name)).items()]
    return {name for name, value in held if "_kernel" in name and hasattr(value, "fn")}


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("target", ["sm90", "sm80"])
def test_every_kernel_computes_the_right_numbers(target, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.ptx.plugin", "-p", "no:cacheprovider",
               "--machine", target, "--few", "--report", str(tmp_path), "tests/numerics",
               "tests/ptx/model_step.py", "tests/ptx/known_races.py"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, f"{ran.stdout[-6000:]}\n{ran.stderr[-2000:]}"
    records = read(tmp_path)
    launched = {launch["kernel"] for record in records for launch in record["launches"]}
    assert launched == every_kernel()
    assert {record["order"] for record in records} == set(ORDERS)
    assert {"bf16", "fp16", "fp32"} <= {
        n["dtype"] for record in records for n in record["launches"]
    }
