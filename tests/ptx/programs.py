"""Small PTX programs for the tests: text in, arrays out."""

import struct

import numpy as np

from .global_memory import Allocation, GlobalMemory
from .launch import run
from .machine import EARLY, Launch, Mode
from .parser import parse

_HEAD = """.version 8.7
.target {target}
.address_size 64
.extern .shared .align 1024 .b8 memory[];
{functions}.visible .entry program({parameters})
{{
{body}
ret;
}}
"""

# registers, and %rd1: where each thread of the grid has a word of array p0; %r1 to %r3 are %tid,
# %ctaid and %ntid
WORD_OF_THREAD = """
.reg .pred %p<8>;
.reg .b32 %r<24>;
.reg .b64 %rd<8>;
ld.param.u64 %rd1, [p0];
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
mov.u32 %r3, %ntid.x;
mad.lo.u32 %r4, %r2, %r3, %r1;
mul.wide.u32 %rd3, %r4, 4;
add.s64 %rd1, %rd1, %rd3;
"""


def execute(
    body: str, *arrays: np.ndarray, threads: int = 32, blocks: int = 1, shared: int = 0,
    cluster: int = 1, target: str = "sm_90a", mode: Mode = EARLY, unwritten: tuple[int, ...] = (),
    counted: bool = False, functions: str = "",
):  # fmt: skip
    """Run ``body``, whose ``.reg`` lines come first, on arrays, which it changes in place.

    Parameter ``pN`` is the address of array N; ``memory`` is ``shared`` bytes of shared memory.
    ``unwritten``: the arrays that nobody wrote. ``functions``: text before the program. Returns the counts of the launch.
    """
    parameters = ", ".join(f".param .u64 p{n}" for n in range(len(arrays)))
    text = _HEAD.format(
        target=target, parameters=parameters, body=body, functions=functions and functions + "\n"
    )
    entry = parse(text)
    memory = GlobalMemory()
    for n, array in enumerate(arrays):
        memory.add(Allocation(array.ctypes.data, array.nbytes, n not in unwritten, f"p{n}"))
    data = struct.pack(f"{len(arrays)}Q", *(array.ctypes.data for array in arrays))
    launch = Launch(entry, (blocks, 1, 1), threads, data, shared, cluster, memory)
    return run(launch, mode, counted)
