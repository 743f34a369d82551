"""Matrices over a warp: ldmatrix, stmatrix, mma.sync. PTX ISA 9.7.14.

In every fragment lane ``4 g + t`` has what belongs to row or column ``g`` (0..7) and to word ``t``
(0..3) of 32 bits. So a register of a warp is an array (8, 4), and a fragment is put together from
its registers without a table of indices.
"""

import numpy as np

from .decode import TOGETHER, Step, opcode
from .errors import MachineError, Unsupported
from .moves import address_of
from .program import Vector
from .registers import WARP

_COUNTS = {"x1": 1, "x2": 2, "x4": 4}
_HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)


def count_warps(threads) -> int:
    """How many whole warps ``threads`` are. MachineError where a lane has ended or is elsewhere."""
    if isinstance(threads, slice):
        whole = threads.start % WARP == 0 and threads.stop % WARP == 0
        count = threads.stop - threads.start
    else:
        count = len(threads)
        whole = count % WARP == 0 and _are_whole(threads.reshape(-1, WARP))
    if not whole:
        raise MachineError("a warp executes this without all of its 32 lanes")
    return count // WARP


def _are_whole(lanes: np.ndarray) -> bool:
    """Whether each row of sorted thread numbers is a warp."""
    first = lanes[:, 0]
    return not (first % WARP).any() and bool((lanes[:, -1] - first == WARP - 1).all())


# ---- ldmatrix and stmatrix


def _matrices(machine, instruction, operand_of_registers: int):
    """(registers, count, transposed, rows), or None for modifiers that are not known.

    ``rows(threads)`` are the indices in shared memory of the rows, and the warps that access them.
    """
    modifiers = list(instruction.modifiers)
    transposed = "trans" in modifiers
    if transposed:
        modifiers.remove("trans")
    if len(modifiers) != 6 or modifiers[:3] != ["sync", "aligned", "m8n8"]:
        return None
    count = _COUNTS.get(modifiers[3])
    if count is None or modifiers[4] not in ("shared", "shared::cta") or modifiers[5] != "b16":
        return None
    registers = instruction.operands[operand_of_registers]
    items = registers.items if isinstance(registers, Vector) else (registers,)
    if len(items) != count:
        raise Unsupported(f"{len(items)} registers for {count} matrices")
    rows = _rows(machine, instruction.operands[1 - operand_of_registers], count)
    return items, count, transposed, rows


def _rows(machine, operand, count: int):
    """Lanes 8 n to 8 n + 7 have the addresses of the rows of matrix n, 16 bytes each."""
    address, used = address_of(machine, operand), slice(8 * count)
    shared = machine.shared

    def rows(threads):
        warps = count_warps(threads)
        where, agents, blocks = (
            each.reshape(warps, WARP)[:, used].ravel()
            for each in (address(threads), machine.warp_of[threads], machine.block_of[threads])
        )
        machine.counts.shared_access(where, 16, agents)
        return shared.index(where, blocks, 16), agents, warps

    return rows


def _turned(words: np.ndarray) -> np.ndarray:
    """(..., 8, 4) words of two halves: the 8 x 8 halves transposed."""
    halves = words.view(np.uint16).swapaxes(-1, -2)
    return np.ascontiguousarray(halves).view(np.uint32)


@opcode("ldmatrix")
def build_load_matrix(machine, instruction):
    """``ldmatrix.sync.aligned.m8n8.xN[.trans].shared[::cta].b16 {r, ...}, [p]``: 9.7.14.5.15"""
    form = _matrices(machine, instruction, 0)
    if form is None:
        return None
    items, count, transposed, rows = form
    results = [machine.registers.result(item, "b32") for item in items]
    shared = machine.shared

    def run(threads):
        index, agents, warps = rows(threads)
        words = shared.load(index, 4, 4, agents).reshape(warps, count, 8, 4)
        if transposed:
            words = _turned(words)
        for n, result in enumerate(results):
            result[threads] = words[:, n].ravel()

    return Step(run, TOGETHER)


@opcode("stmatrix")
def build_store_matrix(machine, instruction):
    """``stmatrix.sync.aligned.m8n8.xN[.trans].shared[::cta].b16 [p], {r, ...}``: 9.7.14.5.16"""
    form = _matrices(machine, instruction, 1)
    if form is None:
        return None
    items, count, transposed, rows = form
    sources = [machine.registers.source(item, "b32") for item in items]
    shared = machine.shared

    def run(threads):
        index, agents, warps = rows(threads)
        words = np.empty((warps, count, 8, 4), np.uint32)
        for n, source in enumerate(sources):
            words[:, n] = source[threads].reshape(warps, 8, 4)
        if transposed:
            words = _turned(words)
        shared.store(index, 4, words.reshape(-1, 4), agents)

    return Step(run, TOGETHER)


# ---- mma.sync


def from_half(words: np.ndarray) -> np.ndarray:
    """Words of two fp16 as fp64, (..., 2 n)."""
    return _HALVES.take(words.view(np.uint16))


def from_bfloat(words: np.ndarray) -> np.ndarray:
    """Words of two bf16 as fp64, (..., 2 n)."""
    bits = words.view(np.uint16).astype(np.uint32)
    return (bits << np.uint32(16)).view(np.float32).astype(np.float64)


def from_tf32(words: np.ndarray) -> np.ndarray:
    """Words of a tf32 as fp64: the low 13 bits are ignored."""
    return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


DECODED = {"f16": from_half, "bf16": from_bfloat, "tf32": from_tf32}
# (shape, type of A and B): registers of A and of B
_SHAPES = {
    ("m16n8k16", "f16"): (4, 2), ("m16n8k16", "bf16"): (4, 2),
    ("m16n8k8", "f16"): (2, 1), ("m16n8k8", "bf16"): (2, 1),
    ("m16n8k8", "tf32"): (4, 2), ("m16n8k4", "tf32"): (2, 1),
}  # fmt: skip


def _multiplication(instruction):
    """(type of A and B, type of C and D, registers of A, of B), or None."""
    modifiers = instruction.modifiers
    if len(modifiers) != 9 or modifiers[:2] != ("sync", "aligned"):
        return None
    shape, a_layout, b_layout, d_type, a_type, b_type, c_type = modifiers[2:]
    known = _SHAPES.get((shape, a_type))
    if known is None or (a_layout, b_layout) != ("row", "col") or a_type != b_type:
        return None
    if c_type != d_type or not (d_type == "f32" or d_type == a_type == "f16"):
        return None
    return a_type, d_type, *known


@opcode("mma")
def build_multiply(machine, instruction):
    """``mma.sync.aligned.shape.row.col.dtype.atype.btype.ctype d, a, b, c``: 9.7.14.5.14

    The sum of the products and c is exact but for fp64, and rounded once. Hardware rounds more
    often, so only a budget judges the two, not equality.
    """
    form = _multiplication(instruction)
    if form is None:
        return None
    input_type, type_, a_count, b_count = form
    d, *sources = [operand.items for operand in instruction.operands]
    c_count = 4 if type_ == "f32" else 2
    if [len(d)] + [len(items) for items in sources] != [c_count, a_count, b_count, c_count]:
        raise Unsupported("a fragment has another number of registers")
    kind = "f32" if type_ == "f32" else "b32"
    results = [machine.registers.result(item, kind) for item in d]
    a, b, c = (
        [machine.registers.source(item, of) for item in items]
        for items, of in zip(sources, ("b32", "b32", kind))
    )
    decoded = DECODED[input_type]
    add, store = (_add_single, _store_single) if type_ == "f32" else (_add_half, _store_half)

    def run(threads):
        warps = count_warps(threads)
        left = decoded(_fragment_a(a, threads, warps)).reshape(warps, 16, -1)
        right = decoded(_fragment_b(b, threads, warps)).reshape(warps, 8, -1)
        found = np.matmul(left, right.transpose(0, 2, 1))
        add(found, c, threads, warps)
        store(results, found, threads, warps)

    return Step(run, TOGETHER)


def _joined(registers, threads) -> np.ndarray:
    """The registers of threads, one after another."""
    return np.concatenate([register[threads] for register in registers])


def _fragment_a(registers, threads, warps: int) -> np.ndarray:
    """Words of A: register n has rows g + 8 (n % 2) and words t + 4 (n // 2) of them."""
    parts = _joined(registers, threads).reshape(-1, 2, warps, 8, 4)
    return np.ascontiguousarray(parts.transpose(2, 1, 3, 0, 4))


def _fragment_b(registers, threads, warps: int) -> np.ndarray:
    """Words of B: register n has columns g and words t + 4 n of them."""
    parts = _joined(registers, threads).reshape(-1, warps, 8, 4)
    return np.ascontiguousarray(parts.transpose(1, 2, 0, 3))


def _add_single(found: np.ndarray, registers, threads, warps: int) -> None:
    """Add C of fp32: register n has rows g + 8 (n // 2) and columns 2 t + n % 2."""
    parts = _joined(registers, threads).reshape(2, 2, warps, 8, 4)
    found.reshape(warps, 2, 8, 4, 2)[...] += parts.transpose(2, 0, 3, 4, 1)


def _store_single(registers, found: np.ndarray, threads, warps: int) -> None:
    parts = found.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    for register, part in zip(registers, parts.astype(np.float32, order="C").reshape(4, -1)):
        register[threads] = part


def _add_half(found: np.ndarray, registers, threads, warps: int) -> None:
    """Add C of fp16: register n has rows g + 8 n and columns 2 t and 2 t + 1."""
    parts = from_half(_joined(registers, threads)).reshape(2, warps, 8, 8)
    found.reshape(warps, 2, 8, 8)[...] += parts.transpose(1, 0, 2, 3)


def _store_half(registers, found: np.ndarray, threads, warps: int) -> None:
    parts = found.reshape(warps, 2, 8, 8).transpose(1, 0, 2, 3).astype(np.float16, order="C")
    for register, part in zip(registers, parts.view(np.uint32).reshape(2, -1)):
        register[threads] = part
