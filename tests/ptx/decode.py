"""From an instruction to a step: each family of opcodes has a file and enters its builders here."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .errors import MachineError, Unsupported
from .program import Instruction
from .registers import Active, active

FAMILIES = ("arithmetic", "bits", "floats", "halves", "comparing", "conversions", "atomics", "moves",
            "control", "calls", "warps", "barriers", "fences", "clusters", "copies", "matrices", "mbarriers",
            "bulk", "tensor_maps", "wgmma")  # fmt: skip
PLAIN, CONTROL, TOGETHER = 0, 1, 2  # kinds of step, added: TOGETHER needs whole warps
BUILDERS: dict[str, list[Callable]] = {}
_NEEDED = {  # the least target of opcodes that begin so
    "sm_90": ("barrier.cluster.", "cp.async.bulk.", "elect.", "fence.mbarrier_init.",
              "fence.proxy.", "getctarank.", "griddepcontrol.", "mapa.", "mbarrier.try_wait.", "stmatrix."),
    "sm_90a": ("setmaxnreg.", "tensormap.", "wgmma."),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One decoded instruction. ``run(threads)``; of kind CONTROL it says itself where they go."""

    run: Callable[[Active], None]
    kind: int = PLAIN


def opcode(*roots: str):
    """Enter a builder for opcodes. It gets the machine and the instruction and returns a Step, or
    None for modifiers that it does not know. Families may share a root (``cp.async`` and
    ``cp.async.bulk``): the first builder that knows the modifiers is taken."""

    def enter(builder):
        for root in roots:
            others = BUILDERS.setdefault(root, [])
            if any(other.__module__ == builder.__module__ for other in others):
                raise ValueError(f"{root} has two builders in {builder.__module__}")
            others.append(builder)
        return builder

    return enter


@functools.cache
def load_families() -> None:
    """Import every family, which enters its builders; one may have been imported before."""
    for family in FAMILIES:
        importlib.import_module(f"{__package__}.{family}")


def decode(machine, instruction: Instruction) -> Step:
    """The step of an instruction, under its guard."""
    load_families()
    target = machine.entry.target
    for least, prefixes in _NEEDED.items():
        if target < least and instruction.opcode.startswith(prefixes):
            raise Unsupported(f"{instruction.root} needs {least}, this is {target}", instruction)
    try:
        built = (build(machine, instruction) for build in BUILDERS.get(instruction.root, ()))
        step = next((step for step in built if step is not None), None)
    except MachineError as error:
        if error.instruction is None:
            raise type(error)(str(error), instruction) from None
        raise
    except (TypeError, AttributeError, LookupError, ValueError) as error:
        said = "its modifiers and operands are of no form that is known"
        raise Unsupported(said, instruction) from error
    if step is None:
        raise Unsupported(f"opcode {instruction.opcode} is not known", instruction)
    return step if instruction.guard is None else _guarded(machine, instruction, step)


def _guarded(machine, instruction: Instruction, step: Step) -> Step:
    """The step for the threads whose guard is true. A jump's others go on."""
    guard = machine.registers.view(instruction.guard.name, "pred")

    def run(threads: Active) -> None:
        chosen = guard[threads] != instruction.negated
        count = np.count_nonzero(chosen)
        if count == len(chosen):
            return step.run(threads)
        if not count and not step.kind & CONTROL:
            return None
        mine = machine.numbers[threads]
        if step.kind & CONTROL:
            machine.go_on(mine[~chosen])
        if count:
            some = mine[chosen]
            if step.kind & TOGETHER and len(machine.whole_warps(some)) != len(some):
                raise MachineError("a guard parts the threads of a warp that must be together")
            step.run(active(some))

    return Step(run, step.kind)
