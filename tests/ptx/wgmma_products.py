"""One ``wgmma.mma_async``: its operands, its arithmetic, and the registers that it must find as
they were. Products of several warpgroups that were issued together are computed together.

Fragments (PTX ISA 9.7.15.5.1.1), thread t of the warpgroup, warp w = t / 32, g = t % 32 / 4, c = t % 4:
    D f32   register 4 j + 2 h + b: row 16 w + 8 h + g, column 8 j + 2 c + b
    D f16   register 2 j + h: the same two columns, b = 0 in its low half
    A       as the A of mma.m16n8k16 (m16n8k8 for tf32) of each warp, rows 16 w and on
"""

import re

import numpy as np

from .asynchronous import Work
from .clocks import PRODUCT, Knowledge
from .errors import Race, Unsupported
from .matrices import DECODED
from .program import Immediate, Vector
from .wgmma_tiles import Shape, Tiles

GROUP, WARPS, ROWS = 128, 4, 64  # threads, warps and rows of a warpgroup
_SHAPE = re.compile(r"m64n(\d+)k(\d+)$")
_SIZES = {"f16": 2, "bf16": 2, "tf32": 4}
_ACCUMULATORS = {"f16": ("f32", "f16"), "bf16": ("f32",), "tf32": ("f32",)}


class Watched:
    """The 32-bit registers of products, and what they held at the fence or after the product."""

    def __init__(self, machine):
        self.machine = machine
        self.now = machine.registers.blocks[4]
        self.then = np.zeros(self.now.shape, np.uint32)
        self.tiles = Tiles(machine)

    def keep(self, rows, threads: slice) -> None:
        """What the registers hold now is what products are to find."""
        self.then[rows, threads] = self.now[rows, threads]

    def check(self, rows, names: tuple[str, ...], threads: slice, reason: str) -> None:
        """Race where a register holds another value than it was to."""
        wrong = self.now[rows, threads] != self.then[rows, threads]
        if wrong.any():
            register, thread = (int(found[0]) for found in np.nonzero(wrong))
            thread += threads.start
            raise Race(
                f"register {names[register]} of thread {thread % self.machine.block_threads} of"
                f" block {int(self.machine.block_of[thread])} of the group {reason}"
            )


def watched(machine) -> Watched:
    """What all wgmma instructions of a machine have in common."""
    if not hasattr(machine, "wgmma"):
        machine.wgmma = Watched(machine)
    return machine.wgmma


class Product(Work):
    """One warpgroup's part of an issue. ``number``: of the watch's agent."""

    def __init__(self, issue: "Issue", place: int, number: int):
        super().__init__(lambda: issue.compute(slice(place, place + 1)))
        self.issue, self.place, self.number = issue, place, number


class Issue:
    """One execution of a product by warpgroups that follow one another from thread ``first``."""

    def __init__(self, multiply: "Multiply", first: int, groups: int):
        self.multiply, self.first, self.groups = multiply, first, groups
        threads = self.threads(slice(0, groups))
        machine = multiply.machine
        blocks = machine.block_of[threads][::GROUP]
        self.a_units = multiply.units(multiply.a, multiply.a_shape, threads, blocks)
        self.b_units = multiply.units(multiply.b, multiply.b_shape, threads, blocks)
        self.adds = multiply.adds(threads, groups)

    def threads(self, places: slice) -> slice:
        """The threads of the warpgroups at ``places``."""
        return slice(self.first + places.start * GROUP, self.first + places.stop * GROUP)

    def check(self, places: slice, reason: str, whole: bool) -> None:
        """Race where a register of A, or ``whole``, also one of D, has changed."""
        threads, multiply = self.threads(places), self.multiply
        common = watched(multiply.machine)
        if whole:
            common.check(multiply.d_rows, multiply.d_names, threads, reason)
        if multiply.a_names:
            common.check(multiply.a_rows, multiply.a_names, threads, reason)

    def compute(self, places: slice) -> None:
        """D = A B + D for the warpgroups at ``places``: exact products, summed in fp64."""
        multiply, threads = self.multiply, self.threads(places)
        common = watched(multiply.machine)
        if self.a_units is None:
            a = multiply.a_fragment(common.now[multiply.a_rows, threads])
        else:
            a = common.tiles.read(self.a_units[places], multiply.a_shape)
        b = common.tiles.read(self.b_units[places], multiply.b_shape)
        with np.errstate(all="ignore"):
            product = np.matmul(multiply.decoded(a), multiply.decoded(b).swapaxes(1, 2))
            if multiply.negative:
                product = -product
            old = common.now[multiply.d_rows, threads]
            new = multiply.accumulated(product, old, self.adds[places])
        common.now[multiply.d_rows, threads] = new
        common.then[multiply.d_rows, threads] = new


class Multiply:
    """The decoded instruction."""

    def __init__(self, machine, instruction, columns: int, types: tuple[str, str]):
        self.machine, self.instruction = machine, instruction
        self.columns, (self.d_type, self.type) = columns, types
        self.size, self.decoded = _SIZES[self.type], DECODED[self.type]
        d, a, b, scale_d, *immediates = instruction.operands
        self.d_names = tuple(item.name for item in d.items)
        self.a_names = tuple(item.name for item in a.items) if isinstance(a, Vector) else ()
        transposes = self._immediates([each.value for each in immediates])
        self.a_shape = Shape(ROWS, self.size, not (transposes[0] if not self.a_names else 0))
        self.b_shape = Shape(columns, self.size, not transposes[-1])
        registers = machine.registers
        self._check_counts()
        self.d_rows = registers.rows(self.d_names, 4)
        self.a_rows = registers.rows(self.a_names, 4) if self.a_names else None
        self.a = None if self.a_names else registers.source(a, "b64")
        self.b = registers.source(b, "b64")
        if isinstance(scale_d, Immediate) and scale_d.value not in (0, 1):
            raise Unsupported("scale-d must be a predicate, 0 or 1")
        self.scale_d = registers.source(scale_d, "pred")
        self.always = scale_d.value if isinstance(scale_d, Immediate) else None

    @classmethod
    def of(cls, machine, instruction, modifiers) -> "Multiply | None":
        """``m64nNkK.dtype.atype.btype``; None for what is not known."""
        if len(modifiers) != 4 or modifiers[2] != modifiers[3]:
            return None
        shape, (d_type, type_) = _SHAPE.match(modifiers[0]), modifiers[1:3]
        if shape is None or d_type not in _ACCUMULATORS.get(type_, ()):
            return None
        columns, depth = int(shape[1]), int(shape[2])
        if columns % 8 or not 8 <= columns <= 256 or depth * _SIZES[type_] != 32:
            return None
        return cls(machine, instruction, columns, (d_type, type_))

    def _immediates(self, values: list[int]) -> list[int]:
        """The transposes of those of A and B that may have one."""
        many = 0 if self.size == 4 else 1 if self.a_names else 2
        if len(values) != 2 + many or not set(values[:2]) <= {1, -1}:
            raise Unsupported(f"wanted two scales of 1 or -1 and {many} transposes, got {values}")
        if not set(values[2:]) <= {0, 1}:
            raise Unsupported(f"transposes must be 0 or 1, got {values[2:]}")
        self.negative = values[0] * values[1] < 0
        return values[2:] or [0, 0]

    def _check_counts(self) -> None:
        wanted = self.columns // (2 if self.d_type == "f32" else 4)
        if len(self.d_names) != wanted or len(self.a_names) not in (0, 4):
            raise Unsupported(
                f"{len(self.d_names)} registers of D and {len(self.a_names)} of A:"
                f" wanted {wanted}, and 4 or a descriptor"
            )

    def same(self, array: np.ndarray, threads: slice) -> np.ndarray:
        """The value of each warpgroup; Unsupported where its threads have several."""
        values = array[threads].reshape(-1, GROUP)
        if (values != values[:, :1]).any():
            raise Unsupported("the threads of a warpgroup have several descriptors or scales")
        return values[:, 0]

    def adds(self, threads: slice, groups: int) -> np.ndarray:
        """Whether each warpgroup adds D."""
        if self.always is not None:
            return np.full(groups, self.always, bool)
        return self.same(self.scale_d, threads)

    def units(self, descriptors, shape: Shape, threads: slice, blocks) -> np.ndarray | None:
        """The numbers of the 16-byte units of each warpgroup's tile."""
        if descriptors is None:
            return None
        return watched(self.machine).tiles.units(self.same(descriptors, threads), shape, blocks)

    # ---- arithmetic

    def a_fragment(self, held: np.ndarray) -> np.ndarray:
        """A's registers (4, threads) as (n, 64, depth) unsigned elements."""
        pack = 4 // self.size  # elements of a register
        parts = np.ascontiguousarray(held).view(f"u{self.size}")
        parts = parts.reshape(2, 2, -1, WARPS, 8, 4, pack)  # (k half, row half, n, w, g, c, pack)
        return parts.transpose(2, 3, 1, 4, 0, 5, 6).reshape(-1, ROWS, 32 // self.size)

    def accumulated(self, product: np.ndarray, old: np.ndarray, adds: np.ndarray) -> np.ndarray:
        """The new registers (registers, threads) of D, for products (n, 64, columns)."""
        groups = len(product)
        parts = product.reshape(groups, WARPS, 2, 8, self.columns // 8, 4, 2)  # n w h g j c b
        if self.d_type == "f32":
            order, held = (4, 2, 6, 0, 1, 3, 5), old.view(np.float32)
        else:
            order, held = (4, 2, 0, 1, 3, 5, 6), np.ascontiguousarray(old).view(np.float16)
        new = parts.transpose(order).reshape(held.shape)
        if adds.all():
            new += held
        elif adds.any():
            new += np.where(np.repeat(adds, held.shape[1] // groups), held, 0)
        return new.astype(held.dtype).view(np.uint32)

    # ---- execution

    def issue(self, first: int, groups: int) -> list[Product]:
        """Start the products of warpgroups that follow one another; done at once in mode early."""
        issue = Issue(self, first, groups)
        late = self.machine.mode.late
        if not late:
            issue.compute(slice(0, groups))
        products = [Product(issue, n, self._watch(issue, n)) for n in range(groups)]
        for product in products:
            product.done = not late
        return products

    def _watch(self, issue: Issue, place: int) -> int:
        """Tell the watch what a warpgroup will read; the number of the product. Each of the four
        warps must know what was written: the instruction is no barrier between them."""
        watch = self.machine.watch
        warp = issue.first // 32 + place * WARPS
        known = Knowledge(
            *(each[warp : warp + WARPS].min(axis=0) for each in (watch.clocks, watch.fenced))
        )
        agent = watch.agent(warp, PRODUCT)
        number = watch.start(agent)
        tiles = [each[place].ravel() for each in (issue.a_units, issue.b_units) if each is not None]
        watch.read_units_later(np.concatenate(tiles), agent, number, known)
        return number
