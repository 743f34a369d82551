"""cvt: PTX ISA 9.7.9.21."""

import numpy as np

from .decode import opcode
from .machine import Step
from .registers import DTYPES

_INTEGERS = {"u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"}


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """fp32 as the bits of bf16, rounded to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """The fp32 of bf16's bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@opcode("cvt")
def build_conversion(machine, instruction):
    """``cvt[.rounding].to.from d, a``"""
    *how, to, origin = instruction.modifiers
    registers = machine.registers
    if to in _INTEGERS and origin in _INTEGERS and not how:
        result = registers.wide_result(instruction.operands[0], to)
        source = registers.source(instruction.operands[1], origin)
        dtype = DTYPES[to]

        def run(threads):
            result[threads] = source[threads].astype(dtype)

        return Step(run)
    return None
