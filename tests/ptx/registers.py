"""The registers of all threads of a group, an array each."""

import numpy as np

from .errors import Unsupported
from .program import SIZES, Entry, Immediate, Operand, Register

WARP = 32
DTYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "tf32": np.float32,
    "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip

Active = slice | np.ndarray  # the threads that execute an instruction: a range, or their numbers


def active(threads: np.ndarray) -> Active:
    """Sorted thread numbers as a range where they are one: numpy then reads without a copy."""
    first, last = int(threads[0]), int(threads[-1])
    return slice(first, last + 1) if last - first + 1 == len(threads) else threads


class Registers:
    """``view(name, type)`` is the array of a register, (threads,), read as a type.

    A smaller type is the low part of the register. Immediates are arrays too, so that an
    instruction reads every operand alike.
    """

    def __init__(self, entry: Entry, threads: int):
        self.entry, self.threads = entry, threads
        self._arrays: dict[str, np.ndarray] = {}
        self._rows: dict[str, int] = {}  # of each register in the block of its size
        counts = dict.fromkeys((1, 2, 4, 8), 0)
        for name, declared in entry.registers.items():
            size = SIZES[declared]
            if size in counts:
                self._rows[name], counts[size] = counts[size], counts[size] + 1
        self.blocks = {n: np.zeros((count, threads), f"u{n}") for n, count in counts.items()}
        self._constants: dict[tuple, np.ndarray] = {}

    def reset(self) -> None:
        """As before the first instruction: what nobody wrote has all bits set, so that it shows."""
        for size, block in self.blocks.items():
            block.fill(1 if size == 1 else np.iinfo(block.dtype).max)

    def view(self, name: str, type_: str) -> np.ndarray:
        declared = self.entry.registers[name]
        if name not in self._arrays:
            row = self.blocks[SIZES[declared]][self._rows[name]]
            self._arrays[name] = row.view(DTYPES[declared])
        array = self._arrays[name]
        if declared == "pred" or type_ == "pred":
            if declared != type_:
                raise Unsupported(f"register {name} is {declared}, not {type_}")
            return array
        size, wanted = SIZES[declared], SIZES[type_]
        if wanted > size:
            raise Unsupported(f"register {name} is {declared}: too small for {type_}")
        return array.view(DTYPES[type_])[:: size // wanted]

    def rows(self, names: tuple[str, ...], size: int) -> slice | np.ndarray:
        """Where registers of ``size`` bytes are in ``blocks[size]``, (registers, threads): a range
        where they were declared one after another, in this order or the other."""
        if any(SIZES[self.entry.registers[name]] != size for name in names):
            raise Unsupported(f"registers of {size} bytes are wanted")
        rows = np.array([self._rows[name] for name in names])
        steps = set(np.diff(rows).tolist())
        if steps == {1}:
            return slice(int(rows[0]), int(rows[-1]) + 1)
        if steps == {-1} and rows[-1] > 0:
            return slice(int(rows[0]), int(rows[-1]) - 1, -1)
        return rows

    def constant(self, value: int | float, type_: str) -> np.ndarray:
        """An immediate, the same in all threads."""
        key = (repr(value), type_)  # -0.0 is not 0.0
        if key not in self._constants:
            self._constants[key] = np.full(self.threads, _bits(value, type_), DTYPES[type_])
        return self._constants[key]

    def source(self, operand: Operand, type_: str) -> np.ndarray:
        """The array that an operand is read from."""
        if isinstance(operand, Register):
            return self.view(operand.name, type_)
        if isinstance(operand, Immediate):
            return self.constant(operand.value, type_)
        raise Unsupported(f"{operand} is no register and no number of type {type_}")

    def result(self, operand: Operand, type_: str) -> np.ndarray:
        """The array that an operand is written to."""
        if not isinstance(operand, Register):
            raise Unsupported(f"{operand} is no register")
        return self.view(operand.name, type_)

    def wide_result(self, operand: Register, type_: str) -> np.ndarray:
        """The array of a result whose register may be wider than ``type_``: loads and conversions
        extend the value, signed types by their sign."""
        declared = self.entry.registers[operand.name]
        if SIZES[declared] <= SIZES[type_]:
            return self.view(operand.name, type_)
        signed = type_[0] == "s"
        return self.view(operand.name, f"{'s' if signed else 'u'}{8 * SIZES[declared]}")


def _bits(value: int | float, type_: str):
    """An immediate as a value of the type's dtype: integers wrap."""
    dtype = np.dtype(DTYPES[type_])
    if dtype.kind == "b":
        return bool(value)
    if dtype.kind == "f":
        if isinstance(value, int):  # the bits of a float, as in mov.b32 of a .f32 register
            unsigned = np.dtype(f"u{dtype.itemsize}")
            return np.array(value & (2 ** (8 * dtype.itemsize) - 1), unsigned).view(dtype)
        return value
    if isinstance(value, float):
        single = dtype.itemsize == 4
        return (
            np.array(value, np.float32 if single else np.float64)
            .view(f"u{dtype.itemsize}")
            .view(dtype)
        )
    return np.array(value & (2 ** (8 * dtype.itemsize) - 1), f"u{dtype.itemsize}").view(dtype)
