"""Count the bytes that a function reads and writes, operation by operation.

A library operation reads its inputs and writes its outputs. A view counts nothing, and neither does
memory that is only reserved. A Triton kernel is not run: each of its tensor arguments counts once
(``TWICE`` names those that it reads and writes through one pointer), as in the "Traffic" line of
its file. Weights do not count. Integers do not count: they are masks, which kernels make in
registers. Data that stays in a cache between two operations counts like all other data. For
``predict.py`` each operation also has its flops, the bytes of the weights it reads, and the dropout
masks it draws.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

TWICE = {"dq_ptr", "d_pre_ptr"}
_RESERVES = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_WRITTEN = ("out", "grad_input")  # arguments that an operation writes to
_OVERWRITES = ("copy_", "zero_", "fill_")  # in place, but nothing old is read
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
# flops of our kernels from their arguments; kernels that are not here only move bytes
KERNEL_FLOPS: dict[str, Callable[[dict], float]] = {
    "tail_gemm_kernel": lambda a: 2 * a["M"] * a["N"] * (a["K"] + a["R"]),
    "tail_gemm_descriptor_kernel": lambda a: 2 * a["M"] * a["N"] * (a["K"] + a["R"]),
    "rank_down_fwd_kernel": lambda a: 2 * a["M"] * a["K"] * a["R"],
    "rank_down_bwd_kernel_da": lambda a: 2 * a["M"] * a["K"] * a["R"],
    "rank_up_fwd_kernel": lambda a: 2 * a["M"] * a["N"] * a["R"],
    "rank_up_bwd_kernel": lambda a: 4 * a["M"] * a["N"] * a["R"],
    "adapter_fwd_kernel": lambda a: 2 * a["M"] * a["R"] * (a["K"] + a["N"]),
    "prefix_fwd_kernel": lambda a: 4 * a["q_ptr"].numel() * a["P"],
    "prefix_bwd_kernel_dq": lambda a: 6 * a["q_ptr"].numel() * a["P"],
    "prefix_bwd_kernel": lambda a: 8 * a["q_ptr"].numel() * a["P"],
}


@dataclass(frozen=True)
class Operation:
    """Bytes of activations moved and of weights read, flops, and elements of masks drawn."""

    name: str
    moved: int
    weights: int = 0
    flops: float = 0
    drawn: int = 0


def storage(tensor: Tensor) -> int:
    """A key of the tensor's memory, on the meta device too."""
    return tensor.untyped_storage()._cdata


def elements(tensor: Tensor) -> int:
    """Elements in memory: an expanded dimension counts once."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride()) if stride)
    return 0 if tensor.numel() == 0 else int(torch.Size(sizes).numel())


class Counter(TorchDispatchMode):
    """Counts the bytes moved inside the context; the storages of ``weights`` do not count."""

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        self.bytes = 0
        self.known = {storage(w): w for w in weights}  # kept alive: no address is reused
        self.rows: list[Operation] = []

    def size(self, tensor: Tensor) -> int:
        """Bytes of a tensor that counts."""
        if not tensor.is_floating_point() and tensor.dtype not in (torch.bool, torch.uint8):
            return 0
        if storage(tensor) in self.known:
            return 0
        return elements(tensor) * tensor.element_size()

    def weight(self, tensor: Tensor) -> int:
        """Bytes of a tensor that is a weight."""
        return tensor.nbytes if storage(tensor) in self.known else 0

    def add(self, name: str, moved: int, **more) -> None:
        """Count one operation."""
        if moved:
            self.bytes += moved
            self.rows.append(Operation(name, moved, **more))

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function.namespace == "pelt_fast":
            return self._opened(function, arguments)
        result = function(*arguments, **keywords)
        name = function._schema.name.removeprefix("aten::")
        read = {key: value for key, value in keywords.items() if key not in _WRITTEN}
        given = [t for t in tree_leaves((arguments, read)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        # a cast or transposed weight is a weight
        if given and all(self._is_weight(t) for t in given):
            self.known.update((storage(t), t) for t in made)
            return result
        storages = set(map(storage, given))
        mutates = function._schema.is_mutable
        is_view = not mutates and all(storage(t) in storages for t in made)
        if (is_view and made) or name in _RESERVES:
            return result
        if name in _OVERWRITES:
            given = given[1:]
        elif name.startswith("new_") or name.endswith("_like"):
            given = []
        self.add(
            name, sum(map(self.size, given)) + sum(map(self.size, made)),
            weights=sum(map(self.weight, given)), flops=_flops(function, arguments, read, result),
        )  # fmt: skip
        return result

    def _is_weight(self, tensor: Tensor) -> bool:
        return storage(tensor) in self.known

    def _opened(self, function, arguments):
        """Run one of our ops as the operations it consists of, so that this mode sees them."""
        from pelt_fast.ops.common.library import OPS

        op = OPS[function._schema.name.removeprefix("pelt_fast::")]
        with self:
            return op.cpu(*arguments)


def _flops(function, arguments, keywords: dict, result) -> float:
    """Flops of a library operation."""
    name = function._schema.name.removeprefix("aten::")
    if name.startswith(_ATTENTION):
        backward = name.endswith("backward")
        q, k = arguments[1:3] if backward else arguments[:2]
        place = 7 if backward else 4
        causal = keywords.get("is_causal") or arguments[place : place + 1] == (True,)
        seen = 0.5 if causal else 1.0
        return seen * (10 if backward else 4) * q.numel() * k.shape[-2]
    formula = flop_registry.get(function.overloadpacket)
    return 0 if formula is None else formula(*arguments, **keywords, out_val=result)


@contextlib.contextmanager
def counted_kernels(counter: Counter) -> Iterator[None]:
    """In this context Triton kernels are not launched: their arguments are counted."""
    from triton.runtime import interpreter, jit

    def launch(kernel, *arguments, grid, warmup, **keywords):
        given = dict(zip(kernel.arg_names, arguments)) | keywords
        tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
        formula = KERNEL_FLOPS.get(kernel.__name__)
        counter.add(
            kernel.__name__,
            sum(counter.size(t) * (2 if n in TWICE else 1) for n, t in tensors.items()),
            weights=sum(map(counter.weight, tensors.values())),
            flops=0 if formula is None else formula(given),
            drawn=_drawn(kernel.__name__, tensors),
        )

    kinds = (jit.JITFunction, interpreter.InterpretedFunction)
    kept = [kind.run for kind in kinds]
    for kind in kinds:
        kind.run = launch
    try:
        yield
    finally:
        for kind, run in zip(kinds, kept):
            kind.run = run


def _drawn(kernel: str, tensors: dict[str, Tensor]) -> int:
    """Elements of the dropout masks that a kernel makes: those of its largest tensor, if it has a
    seed and no mask bits."""
    if kernel == "mask_bits_kernel":
        return 8 * tensors["bits_ptr"].numel()
    seeded = any("seed" in name for name in tensors) and "bits_ptr" not in tensors
    return max(t.numel() for t in tensors.values()) if seeded else 0


def bytes_moved(work: Callable[[], object], weights: Iterable[Tensor]) -> Counter:
    """The bytes that ``work()`` moves."""
    counter = Counter(weights)
    with counter:
        work()
    return counter
