"""The machine's judges, Triton's well-known kernels, in a process of their own: in the others
kernels are interpreted, and the two files are skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.mark.quick(every=2)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="they run in this process")
@pytest.mark.parametrize("target", ["sm90", "sm80"])
def test_what_triton_compiles_is_right_on_the_machine(target):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider",
               f"tests/ptx/test_triton_{target}.py"]  # fmt: skip
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = ran.stdout[-6000:]
    assert ran.returncode == 0 and " passed in " in said and "skipped" not in said, (
        said + ran.stderr
    )
