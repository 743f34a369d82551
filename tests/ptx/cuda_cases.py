"""Inputs for the kernels of csrc/cuda, and what is right: fp64 and the budget of tests/numerics."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.numerics.judge import check, dense

from .cuda_host import Compiled
from .cuda_launch import rank_backward, tail_gemm
from .machine import Mode

SHUFFLED = Mode(late=True, shuffled=True, seed=1)
SCALE, KEEP = 0.5, 1.25
GAP = 8  # elements between the rows of what may be strided


def _apart(*shape: int, dtype: torch.dtype) -> Tensor:
    """Rows that lie GAP elements apart; what is between is NaN."""
    wide = dense(shape[0], shape[1] + GAP, dtype=dtype)
    wide[:, shape[1] :] = float("nan")
    return wide[:, : shape[1]]


def _said(*words) -> str:
    return "-".join(str(word).removeprefix("torch.") for word in words if word)


@dataclass(frozen=True)
class Backward:
    """rank_backward of dy (M, N), h (M, R), b (N, R)."""

    M: int
    N: int
    R: int
    dtype: torch.dtype = torch.bfloat16
    target: str = "sm_80"
    processors: int = 1
    need_bias: bool = True

    def __str__(self) -> str:
        shape, bias = f"{self.M}x{self.N}", "bias" * self.need_bias
        return _said("backward", shape, f"r{self.R}", self.dtype, self.target, bias)

    def run(self, mode: Mode, code: Compiled | None = None) -> list[Tensor]:
        """The results in a mode; the inputs are always the same."""
        found = rank_backward(*self._inputs(), SCALE, self.need_bias, self.target, mode=mode,
                              processors=self.processors, code=code)  # fmt: skip
        return [tensor for tensor in found if tensor is not None]

    def check(self, found: list[Tensor]) -> None:
        """The results are within the budget of fp64."""
        inputs = self._inputs()
        low, exact = self._expression(*inputs), self._expression(*(t.double() for t in inputs))
        for its, plain, wanted in zip(found, low, exact):
            check(its, plain, wanted, its.dtype)

    def _inputs(self) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        dtype = self.dtype
        dy, h = _apart(self.M, self.N, dtype=dtype), dense(self.M, self.R, dtype=dtype)
        return dy, h, dense(self.N, self.R, dtype=dtype)

    def _expression(self, dy: Tensor, h: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return SCALE * dy @ b, SCALE * dy.t() @ h, SCALE * dy.sum(0)


@dataclass(frozen=True)
class Tail:
    """tail_gemm of a (M, K), w, s (M, R), u."""

    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype = torch.bfloat16
    cluster: int = 2
    transposed: bool = False
    masked: bool = True
    need_bias: bool = True
    processors: int = 2
    skew: int = 0  # bytes from an aligned address to the mask

    def __str__(self) -> str:
        words = ("turned" * self.transposed, "mask" * self.masked, "bias" * self.need_bias,
                 f"skew{self.skew}" * bool(self.skew))  # fmt: skip
        shape = f"{self.M}x{self.K}x{self.N}"
        return _said("tail", shape, f"r{self.R}", self.dtype, f"cluster{self.cluster}", *words)

    def run(self, mode: Mode, code: Compiled | None = None) -> list[Tensor]:
        """The result in a mode; what lies between its rows was not written."""
        a, w, s, u, bias, bits = self._inputs()
        out = tail_gemm(a, w, s, u, bias if self.need_bias else None,
                        bits if self.masked else None, KEEP, self.transposed, self.cluster,
                        processors=self.processors, gap=GAP, mode=mode, code=code)  # fmt: skip
        between = out.as_strided((self.M, GAP), (self.N + GAP, 1), self.N)
        assert (between.contiguous().view(torch.uint8) == 0xFF).all(), "writes between the rows"
        return [out.contiguous()]

    def without_tail(self) -> list[Tensor]:
        """What a kernel gives that leaves the tail out."""
        a, w, s, *rest = self._inputs()
        return [self._expression(a, w, torch.zeros_like(s), *rest)]

    def check(self, found: list[Tensor]) -> None:
        """The result is within the budget of fp64."""
        *inputs, bits = self._inputs()
        low = self._expression(*inputs, bits)
        exact = self._expression(*(t.double() for t in inputs), bits)
        check(found[0], low, exact, self.dtype)

    def _inputs(self) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        M, K, N, R, dtype = self.M, self.K, self.N, self.R, self.dtype
        a, s = _apart(M, K, dtype=dtype), dense(M, R, dtype=dtype)
        turn = (lambda *shape: shape) if self.transposed else (lambda *shape: shape[::-1])
        # products of one size, or the larger one's budget would hide the other
        w = dense(*turn(K, N), dtype=dtype, scale=K**-0.5)
        u, bias = dense(*turn(R, N), dtype=dtype, scale=R**-0.5), dense(N, dtype=dtype)
        bits = torch.randint(256, (self.skew + M * N // 8,), dtype=torch.uint8)[self.skew :]
        return a, w, s, u, bias, bits.view(M, N // 8)

    def _expression(self, a, w, s, u, bias, bits) -> Tensor:
        w, u = (w, u) if self.transposed else (w.t(), u.t())
        update = s @ u
        if self.masked:  # a bit an element, the lowest first
            kept = (bits[:, :, None] >> torch.arange(8)) & 1
            update = torch.where(kept.view(self.M, self.N) == 1, KEEP * update, 0)
        return a @ w + update + (bias if self.need_bias else 0)


def differs(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether any bit of two results differs."""
    bits = [[tensor.contiguous().view(torch.uint8) for tensor in found] for found in (one, other)]
    return not all(map(torch.equal, *bits))
