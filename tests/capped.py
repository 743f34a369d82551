"""The suite's second share: what runs native code, under a smaller instruction set than this CPU's.

``python -m tests.capped`` caps torch (``ATEN_CPU_CAPABILITY``) and the C++ ops (``PELT_FAST_ISA``)
one level below what the first share ran under: a machine with AVX-512 tests what one with AVX2
alone would, and that one what one without would.
"""

import os
import subprocess
import sys

import torch

# the first share's capability of torch, and the caps of torch and of the C++ ops of this one
# (inductor writes no code for torch's lowest level: only the ops are capped there)
CAPS = {
    "AVX512": dict(ATEN_CPU_CAPABILITY="avx2", PELT_FAST_ISA="avx2"),
    "AVX2": dict(PELT_FAST_ISA="portable"),
}
SHARE = (
    "tests/ops", "tests/reference", "tests/models/test_paper.py", "tests/models/test_points.py",
    "tests/models/test_prompt.py", "tests/models/test_inference.py",
)  # fmt: skip


def capped(capability: str) -> dict[str, str]:
    """The environment variables that cap a machine of ``capability``; none where it has no less."""
    return CAPS.get(capability, {})


def main() -> int:
    capability = torch.backends.cpu.get_cpu_capability()
    caps = capped(capability)
    if not caps:
        print(f"one share: {capability} is the least this CPU can be capped to")
        return 0
    said = " ".join(f"{name}={value}" for name, value in caps.items())
    print(f"the first share ran under {capability}; the second under {said}", flush=True)
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "worksteal", *SHARE]
    return subprocess.call([*command, *sys.argv[1:]], env={**os.environ, **caps})


if __name__ == "__main__":
    sys.exit(main())
