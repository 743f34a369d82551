"""The suite's second share runs under what it says (tests/capped.py)."""

import os
import subprocess
import sys

import pytest
import torch

from tests.capped import CAPS, SHARE, capped

SAYS = """
import torch
from pelt_fast.ops.common import native
print(torch.backends.cpu.get_cpu_capability(), *native.facts().values(), sep=";")
"""


def test_the_share_is_there():
    assert all(os.path.exists(path) for path in SHARE)
    assert capped("DEFAULT") == {}


@pytest.mark.parametrize("capability", CAPS)
def test_the_caps_are_taken(capability):
    caps = capped(capability)
    own = torch.backends.cpu.get_cpu_capability()
    if own not in ("AVX512", capability):
        pytest.skip(f"this CPU has {own}")
    command = [sys.executable, "-c", SAYS]
    said = subprocess.run(command, env={**os.environ, **caps}, capture_output=True, text=True)
    torchs, *ours = said.stdout.strip().split(";")
    assert torchs.lower() == caps.get("ATEN_CPU_CAPABILITY", own.lower()), said.stderr
    assert not ours or any(caps["PELT_FAST_ISA"] in fact for fact in ours), ours
