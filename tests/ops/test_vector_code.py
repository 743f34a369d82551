"""The machine code of the C++ ops: on AVX2 and AVX-512 their arithmetic is done in vectors.

GCC leaves a loop with a comparison of floats scalar unless it may assume that nobody reads the
floating-point flags (-fno-trapping-math); an activation was ten times slower then. Nothing else shows
it: the numbers are the same.
"""

import re
import shutil
import subprocess
from collections import Counter, defaultdict

import pytest

from pelt_fast.ops.common import native

OBJDUMP = shutil.which("objdump")
pytestmark = [
    pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing())),
    pytest.mark.skipif(OBJDUMP is None, reason="objdump is not on this machine"),
]
FUNCTION = re.compile(r"^[0-9a-f]+ <pelt_fast::.*?(\w+)_(avx2|avx512)\((.*)")
ARITHMETIC = re.compile(r"\tv(?:fn?m(?:add|sub)\d*|add|sub|mul|div|min|max|sqrt)(ss|ps) ")
MOSTLY_VECTORS = 0.5  # of the instructions: what is left over of a row is done one by one
EXCEPTIONS = {  # whose remainders are unrolled: more instructions, run once a row
    ("few_rows", "FewRows"), ("few", "Prefix"),
    ("routed_up", "Up"), ("routed_down", "Down"), ("weigh", "Weights"), ("backward", "Weights"),
    ("transposed", "Transposed"),  # moves numbers; widens those of a 16-bit factor
}  # fmt: skip


def counted() -> dict[tuple[str, str, str], Counter]:
    """(function, what it takes, instruction set) -> instructions on one float and on vectors."""
    from pelt_fast import _C

    command = [OBJDUMP, "-d", "-C", "--no-show-raw-insn", _C.__file__]
    found, now = defaultdict(Counter), None
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    ):
        if line.endswith(">:"):
            match = FUNCTION.match(line)
            now = match and (match[1], re.search(r"(\w+) const&", match[3])[1], match[2])
        elif now is not None and (match := ARITHMETIC.search(line)):
            found[now][match[1]] += 1
    return found


def test_arithmetic_is_done_in_vectors():
    """A gelu in scalar code counts 288 instructions on one float beside 96 on vectors."""
    found = counted()
    if not found:
        pytest.skip("the ops were built for another processor, or without their names")
    assert {name for name, _, _ in found} >= {
        "activate",
        "backward",
        "adapter",
        "merge",
        "up",
        "down",
    }
    scalar = {
        name: dict(count)
        for name, count in found.items()
        if name[:2] not in EXCEPTIONS and count["ps"] < count.total() * MOSTLY_VECTORS
    }
    assert not scalar, scalar


def test_an_activation_has_hardly_anything_else():
    for (name, takes, _), count in counted().items():
        if takes == "Activate":
            assert count["ps"] > 5 * count["ss"], (name, count)
