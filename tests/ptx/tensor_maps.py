"""Tensor maps: what bulk copies are told of a tensor in global memory. PTX ISA 5.5.8, and
9.7.9.28 ``tensormap.replace``, 9.7.13.16 ``tensormap.cp_fenceproxy``.

The hardware's 128 bytes are opaque. Ours, little endian: address u64, rank u32, element type u32
(the codes of ``tensormap.replace``), interleave u32, swizzle u32, fill u32, box u32[5], element
strides u32[5], sizes u32[5] (innermost first), strides u64[4] (bytes), and 8 bytes ``PTXTMAP1``.
"""

import functools
import struct
from dataclasses import dataclass

import numpy as np

from .decode import TOGETHER, Step, opcode
from .errors import BadAccess, Race, Unsupported
from .moves import PARAMETERS, address_of
from .program import Immediate

SIZE, ALIGN = 128, 64
MAGIC = b"PTXTMAP1"
_LAYOUT = "<QIIIII5I5I5I4Q8s"
ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 9: 8, 10: 2}
_FLOATS = {6: b"\xff\x7f", 7: b"\xff\xff\xff\x7f", 9: b"\xff" * 7 + b"\x7f", 10: b"\xff\x7f"}
SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # mode: bytes of a row that it mixes


@dataclass(frozen=True)
class TensorMap:
    """A tensor of ``sizes`` elements, innermost first, and the box of it that one copy moves.

    ``strides`` are bytes, of the dimensions from the second on. ``element`` is a code of
    ``tensormap.replace``'s ``.elemtype``, ``swizzle`` a key of ``SWIZZLES``, ``fill`` 1 for NaN.
    """

    address: int
    element: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    swizzle: int = 0
    fill: int = 0
    interleave: int = 0

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.element]

    @property
    def nan(self) -> bytes:
        """What an element outside the tensor is filled with."""
        return _FLOATS[self.element] if self.fill else bytes(self.element_bytes)

    def pack(self) -> bytes:
        """The 128 bytes."""
        five = [(*values, *[0] * (5 - len(values))) for values in
                (self.box, self.element_strides, self.sizes)]  # fmt: skip
        strides = (*self.strides, *[0] * (4 - len(self.strides)))
        return struct.pack(_LAYOUT, self.address, self.rank, self.element, self.interleave,
                           self.swizzle, self.fill, *five[0], *five[1], *five[2], *strides,
                           MAGIC)  # fmt: skip

    @staticmethod
    def unpack(data: bytes) -> "TensorMap":
        """The map that 128 bytes are. BadAccess where no GPU would take it, Unsupported for what
        the machine does not know."""
        return _unpack(bytes(data))

    def check(self) -> None:
        """The rules of cuTensorMapEncodeTiled."""
        if self.interleave:
            raise Unsupported(f"a tensor map with interleave layout {self.interleave}")
        if self.element not in ELEMENT_BYTES:
            raise Unsupported(f"a tensor map of element type {self.element}")
        if self.swizzle not in SWIZZLES:
            raise Unsupported(f"a tensor map of swizzle mode {self.swizzle}")
        for wrong, said in self._faults():
            if wrong:
                raise BadAccess(f"a tensor map {said}")

    def _faults(self):
        inner, span = self.box[0] * self.element_bytes, SWIZZLES[self.swizzle]
        yield self.address % 16, f"of address {self.address:#x}: wanted a multiple of 16"
        yield min(self.sizes) < 1, f"of sizes {self.sizes}"
        for stride in self.strides:
            yield stride % 16, f"of stride {stride}: wanted a multiple of 16 bytes"
            yield stride >= 1 << 40, f"of stride {stride}: wanted less than 2^40 bytes"
        yield min(self.box) < 1 or max(self.box) > 256, f"of box {self.box}: wanted 1 to 256"
        yield (
            min(self.element_strides) < 1 or max(self.element_strides) > 8,
            f"of element strides {self.element_strides}: wanted 1 to 8",
        )
        yield inner % 16, f"whose box has rows of {inner} bytes: wanted a multiple of 16"
        yield span and inner > span, f"of swizzle {span} bytes whose box has rows of {inner}"
        yield self.fill not in (0, 1), f"of fill mode {self.fill}"
        yield self.fill and self.element not in _FLOATS, "of integers that is filled with NaN"


@functools.lru_cache(maxsize=4096)
def _unpack(data: bytes) -> TensorMap:
    address, rank, element, interleave, swizzle, fill, *rest, magic = struct.unpack(_LAYOUT, data)
    if magic != MAGIC:
        raise BadAccess("there is no tensor map: these 128 bytes were never encoded as one")
    if not 1 <= rank <= 5:
        raise BadAccess(f"a tensor map of {rank} dimensions")
    box, steps, sizes, strides = rest[0:5], rest[5:10], rest[10:15], rest[15:19]
    found = TensorMap(address, element, tuple(sizes[:rank]), tuple(strides[: rank - 1]),
                      tuple(box[:rank]), tuple(steps[:rank]), swizzle, fill, interleave)  # fmt: skip
    found.check()
    return found


def map_at(machine, address: int) -> TensorMap:
    """The tensor map at a generic address: in global memory or in the parameters."""
    return TensorMap.unpack(_bytes_at(machine, address).tobytes())


@dataclass
class Acquired:
    """``fence.proxy.tensormap::generic.acquire`` of a warp, at a clock of it, after the last write
    to the map."""

    warp: int
    clock: int
    write: int


def acquire_map(machine, address: int, warp: int) -> None:
    """A warp executes ``fence.proxy.tensormap::generic.acquire`` of the map at an address."""
    if address >= PARAMETERS:
        return
    allocation = machine.memory.containing(address)
    if allocation is None:
        raise BadAccess(f"a fence of a tensor map at {address:#x}, which is in no allocation")
    if allocation.lines is None:
        return
    write, key = allocation.last_write(address - allocation.start, SIZE), ("map", address)
    known = [one for one in machine.states.get(key, ()) if one.write == write]
    if not any(one.warp == warp for one in known):
        known.append(Acquired(warp, int(machine.watch.clocks[warp, warp]), write))
    machine.states[key] = known


def check_acquired(machine, address: int, warp: int) -> None:
    """Race where a warp uses a map that this launch wrote, and knows of no fence that acquired it."""
    allocation = machine.memory.containing(address)
    if allocation is None or allocation.lines is None:
        return
    start = address - allocation.start
    write, clocks = allocation.last_write(start, SIZE), machine.watch.clocks[warp]
    known = machine.states.get(("map", address), ())
    if write and not any(one.write == write and clocks[one.warp] >= one.clock for one in known):
        raise Race(
            f"warp {warp} uses the tensor map at byte {start} of {allocation.name or 'an allocation'},"
            " which this launch wrote, without fence.proxy.tensormap::generic.acquire between"
        )


def _bytes_at(machine, address: int, writes: bool = False) -> np.ndarray:
    """The 128 bytes of a map; of global memory their own memory."""
    if address % ALIGN:
        raise BadAccess(f"address {address:#x} of a tensor map is no multiple of {ALIGN}")
    if address >= PARAMETERS and not writes:
        start = address - PARAMETERS
        if start + SIZE > machine.entry.parameter_bytes:
            raise BadAccess(f"a tensor map at byte {start} of the parameters is outside them")
        return machine.parameters[start : start + SIZE]
    allocation = machine.memory.containing(address)
    start = address - allocation.start if allocation else 0
    if allocation is None or start + SIZE > allocation.size:
        raise BadAccess(f"a tensor map at {address:#x} is in no allocation")
    here = slice(start, start + SIZE)
    if writes:
        allocation.wrote(np.array([start]), SIZE)
    if allocation.written is not None:
        if writes:
            allocation.written[here] = 1
        elif not allocation.written[here].all():
            raise BadAccess(f"a tensor map at byte {start} of {allocation.name}: nobody wrote it")
    return allocation.bytes[here]


# field: (its first word, words of one value, how many values)
_FIELDS = {
    "global_address": (0, 2, 1), "rank": (2, 1, 1), "elemtype": (3, 1, 1),
    "interleave_layout": (4, 1, 1), "swizzle_mode": (5, 1, 1), "fill_mode": (6, 1, 1),
    "box_dim": (7, 1, 5), "element_stride": (12, 1, 5), "global_dim": (17, 1, 5),
    "global_stride": (22, 2, 4),
}  # fmt: skip
_MAGIC_WORDS = np.frombuffer(MAGIC, np.uint32)


@opcode("tensormap")
def build_tensor_map(machine, instruction):
    """``tensormap.replace`` and ``tensormap.cp_fenceproxy``"""
    operation = instruction.modifiers[0]
    if operation == "replace":
        return _build_replace(machine, instruction)
    return _build_copy(machine, instruction) if operation == "cp_fenceproxy" else None


def _build_replace(machine, instruction):
    """``tensormap.replace.tile.field.space.b1024.b32|b64 [address][, ordinal], value``"""
    _, mode, field, space, whole, type_ = instruction.modifiers
    if mode != "tile" or field not in _FIELDS or whole != "b1024":
        return None
    first, words, many = _FIELDS[field]
    a, *ordinal, value = instruction.operands
    if type_ != f"b{32 * words}" or len(ordinal) != (many > 1):
        return None
    if ordinal and not (isinstance(ordinal[0], Immediate) and 0 <= ordinal[0].value < many):
        return None
    at = first + words * (ordinal[0].value if ordinal else 0)
    values = machine.registers.source(value, type_)

    def change(data, threads):
        new = np.ascontiguousarray(values[threads]).view(np.uint32).reshape(-1, words)
        data[:, at : at + words] = new + 1 if field == "rank" else new  # the rank less one is given
        data[:, 30:32] = _MAGIC_WORDS
        return data

    return _replace_step(machine, a, space, change)


def _replace_step(machine, a, space: str, change):
    """A map is read, changed, and written: the instruction accesses all its 128 bytes."""
    address, shared, memory_of = address_of(machine, a), machine.shared, _bytes_at

    def in_shared(threads):
        warps = machine.warp_of[threads]
        index = shared.index(address(threads), machine.block_of[threads], SIZE, ALIGN)
        data = shared.load(index, 4, SIZE // 4, warps)
        shared.store(index, 4, change(data, threads), warps)

    def in_global(threads):
        numbers = machine.numbers[threads]
        for thread, where in zip(numbers, address(threads).tolist()):
            data = memory_of(machine, where)[None].view(np.uint32).copy()
            memory_of(machine, where, True)[:] = change(data, np.array([thread])).view(np.uint8)[0]

    if space == "global":
        return Step(in_global)
    return Step(in_shared) if space in ("shared", "shared::cta") else None


def _build_copy(machine, instruction):
    """``tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.scope.sync.aligned
    [dst], [src], 128``: once a warp"""
    spaces, (scope, *rest) = instruction.modifiers[1:5], instruction.modifiers[5:]
    dst, src, size = instruction.operands
    if spaces != ("global", "shared::cta", "tensormap::generic", "release"):
        return None
    if scope not in ("cta", "cluster", "gpu", "sys") or rest != ["sync", "aligned"]:
        return None
    if size != Immediate(SIZE):
        return None
    to, source, shared = address_of(machine, dst), address_of(machine, src), machine.shared

    def run(threads):
        _, lead = np.unique(machine.warp_of[threads], return_index=True)
        blocks, warps = machine.block_of[threads][lead], machine.warp_of[threads][lead]
        index = shared.index(source(threads)[lead], blocks, SIZE, ALIGN)
        data = shared.load(index, 8, SIZE // 8, warps)
        for where, words in zip(to(threads)[lead].tolist(), data):
            _bytes_at(machine, where, writes=True)[:] = words.view(np.uint8)

    return Step(run, TOGETHER)


@opcode("prefetch")
def build_prefetch(machine, instruction):
    """``prefetch[.param|.const].tensormap [a]``: a hint; the address must be a map's"""
    if instruction.modifiers[-1:] != ("tensormap",):
        return None
    if instruction.modifiers[:-1] not in ((), ("param",)):
        return None
    address = address_of(machine, instruction.operands[0])

    def run(threads):
        for where in np.unique(address(threads)).tolist():
            map_at(machine, where)

    return Step(run)
