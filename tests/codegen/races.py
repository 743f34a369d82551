"""Races of asynchronous work in compiled code: the loops of a TTGIR run by hand, late work last.

Copies from global memory and the products of a warpgroup (wgmma, and sm_100's tcgen05) run beside
the program until it waits for them. Here they finish only at that wait: a buffer that is written
while a product may still read it, or read while a copy may still fill it, is a race, however rarely
a GPU shows it. Not looked at: whether a bulk copy (TMA) has come, which barriers count in bytes.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field

TURNS = 8  # of every loop: more than any pipeline has stages

_ARITHMETIC = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul, "andi": operator.and_,
    "ori": operator.or_, "xori": operator.xor, "divsi": operator.floordiv, "remsi": operator.mod,
    "maxsi": max, "minsi": min,
}  # fmt: skip
_COMPARED = {
    "eq": operator.eq, "ne": operator.ne, "slt": operator.lt, "sle": operator.le,
    "sgt": operator.gt, "sge": operator.ge, "ult": operator.lt, "uge": operator.ge,
}  # fmt: skip
_NAME = r"%[\w$.#-]+"
_VIEWS = ("memdesc_trans", "memdesc_subslice", "memdesc_reshape", "memdesc_reinterpret")
_COPY, _BULK_COPY = "async_copy_global_to_local", "async_tma_copy_global_to_local"


@dataclass(frozen=True)
class Slot:
    """One buffer in shared memory: what allocated it, and which of its slots (None: not known)."""

    buffer: str
    index: int | None = 0

    def meets(self, other: "Slot") -> bool:
        """Whether the two may be the same memory."""
        same = None in (self.index, other.index) or self.index == other.index
        return self.buffer == other.buffer and same


@dataclass(frozen=True)
class Product:
    """A product under way: what it reads, and the barrier that says it is done (sm_100)."""

    reads: tuple[Slot, ...]
    barrier: Slot | None = None


@dataclass
class Node:
    """A line of the code and the regions it opens."""

    line: str
    regions: list[list["Node"]] = field(default_factory=list)


def parsed(ttgir: str) -> list[Node]:
    """The lines as a tree of regions, without locations."""
    stack: list[list[Node]] = [[]]
    for line in ttgir.splitlines():
        line = re.sub(r"\s+loc\([^()]*\)$", "", line).strip()
        if line.startswith("}"):
            stack.pop()
        elif line and not line.startswith("^"):
            stack[-1].append(Node(line))
        if line.endswith("{"):
            stack[-1][-1].regions.append([])
            stack.append(stack[-1][-1].regions[-1])
    return stack[0]


class Run:
    """The state of one run: what names hold, products and copies under way, races found."""

    def __init__(self):
        self.values: dict[str, int | Slot | None] = {}
        self.products: list[Product] = []
        self.copies: list[list[Slot]] = []
        self.copied: list[Slot] = []  # not yet in a group
        self.races: dict[str, None] = {}

    def value(self, name: str) -> int | Slot | None:
        return self.values.get(name)

    def slots(self, line: str) -> list[Slot]:
        """The buffers among a line's operands."""
        found = (self.values.get(name) for name in re.findall(_NAME, line.split(" : ")[0]))
        return [slot for slot in found if isinstance(slot, Slot)]

    def write(self, slot: Slot, by: str) -> None:
        for product in self.products:
            if any(slot.meets(read) for read in product.reads):
                self.races[f"{by} overwrites {slot.buffer} while a product reads it"] = None

    def read(self, slot: Slot, by: str) -> None:
        for group in (*self.copies, self.copied):
            if any(slot.meets(filled) for filled in group):
                self.races[f"{by} reads {slot.buffer} before its copy has come"] = None

    def block(self, nodes: list[Node]) -> list:
        """Run a region; what it yields."""
        yielded: list = []
        for node in nodes:
            name = re.match(rf"({_NAME})(?::\d+)? = ", node.line)
            body = node.line[name.end() :] if name else node.line
            if body.startswith("scf.yield"):
                operands = body.split(" : ")[0]
                yielded = [self.value(operand) for operand in re.findall(_NAME, operands)]
            elif body.startswith("scf.for"):
                self.loop(name and name[1], body, node.regions[0])
            elif node.regions:
                for region in node.regions:
                    self.block(region)
            else:
                self.operation(name and name[1], body)
        return yielded

    def loop(self, name: str | None, body: str, region: list[Node]) -> None:
        carried = re.search(r"iter_args\((.*?)\) ->", body)
        pairs = re.findall(rf"({_NAME}) = ({_NAME})", carried[1]) if carried else []
        names, held = [inner for inner, _ in pairs], [self.value(outer) for _, outer in pairs]
        for _ in range(TURNS):
            self.values |= zip(names, held)
            held = self.block(region) or held
        if name:
            self.values |= {f"{name}#{i}": value for i, value in enumerate(held)}
            self.values[name] = held[0] if held else None

    def operation(self, name: str | None, body: str) -> None:
        """One operation that opens no region."""
        full, *_ = body.split(None, 1)
        dialect, _, kind = full.partition(".")
        if dialect == "arith":
            self.values[name] = self.arithmetic(kind, body)
        elif kind == "local_alloc":
            self.values[name] = Slot(name)
            if not body.startswith("ttg.local_alloc :"):
                self.write(Slot(name), name)
        elif kind == "memdesc_index":
            of, index = re.findall(_NAME, body)[:2]
            index = self.value(index)
            buffer = self.value(of)
            self.values[name] = buffer and Slot(buffer.buffer, index)
        elif kind in _VIEWS:
            self.values[name] = self.value(re.search(_NAME, body)[0])
        elif kind in (_COPY, _BULK_COPY):
            self.copied += self.slots(body) if kind == _COPY else []
            for slot in self.slots(body):
                self.write(slot, name or full)
        elif kind == "local_store":
            for slot in self.slots(body):
                self.write(slot, full)
        elif kind == "local_dealloc":
            for slot in self.slots(body):
                self.write(Slot(slot.buffer, None), full)
        elif kind == "async_commit_group":
            self.copies.append(self.copied)
            self.copied = []
        elif kind == "async_wait":
            self.copies = last(self.copies, int(re.search(r"num = (\d+)", body)[1]))
        elif kind == "local_load":
            for slot in self.slots(body):
                self.read(slot, name)
        elif kind == "warp_group_dot":
            self.product(name, body, "isAsync = true" in body)
        elif kind == "tc_gen5_mma":
            self.product(full, body, "is_async" in body, re.search(rf"({_NAME})\[", body))
        elif kind == "wait_barrier":
            self.wait(self.value(re.search(_NAME, body)[0]))
        elif kind == "warp_group_dot_wait":
            self.products = last(self.products, int(re.search(r"pendings = (\d+)", body)[1]))
            results = re.findall(_NAME, body.split("{")[0])
            self.values |= {f"{name}#{i}": self.value(r) for i, r in enumerate(results)}

    def product(self, name: str, body: str, under_way: bool, barrier=None) -> None:
        barrier = barrier and self.value(barrier[1])
        reads = tuple(slot for slot in self.slots(body) if slot != barrier)
        for slot in reads:
            self.read(slot, name)
        self.products = [*self.products, Product(reads, barrier)] if under_way else []

    def wait(self, barrier: Slot | None) -> None:
        """Until the oldest product of ``barrier`` is done; products are done in order."""
        for i, product in enumerate(self.products):
            if product.barrier and barrier and product.barrier.meets(barrier):
                self.products = self.products[i + 1 :]
                return

    def arithmetic(self, kind: str, body: str) -> int | None:
        """The value of a whole-number operation whose operands are known."""
        if kind == "constant":
            found = re.match(r"arith\.constant (-?\d+|true|false)\b", body)
            if found is None or "dense" in body:
                return None
            return {"true": 1, "false": 0}.get(found[1]) if found[1][0] in "tf" else int(found[1])
        operands = [self.value(name) for name in re.findall(_NAME, body.split(" : ")[0])]
        if kind == "select":
            condition, yes, no = operands
            return None if condition is None else (yes if condition else no)
        if any(not isinstance(operand, int) for operand in operands):
            return None
        if kind == "cmpi":
            compare: Callable = _COMPARED[re.search(r"cmpi (\w+)", body)[1]]
            return int(compare(*operands))
        if kind in ("extsi", "extui", "trunci"):
            return operands[0]
        return _ARITHMETIC[kind](*operands) if kind in _ARITHMETIC else None


def last(groups: list, count: int) -> list:
    """The newest ``count``: what may still be under way after a wait that leaves so many."""
    return groups[len(groups) - count :] if count < len(groups) else groups


def races(ttgir: str) -> list[str]:
    """The races of one kernel, each once."""
    run = Run()
    run.block(parsed(ttgir))
    return list(run.races)
