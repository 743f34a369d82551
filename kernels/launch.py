"""Launch a kernel from Python without the work that Triton repeats at every launch.

Triton binds and classifies all arguments at each launch. This takes 37 us of the host's time for a
kernel of 25 arguments on an H200's machine, while many of our kernels run for 20 us
(docs/facts.md). Triton needs only few facts: dtypes, whether a pointer is a multiple of 16 bytes,
whether an integer is 1, a multiple of 16, or wider than 32 bits. ``launched`` stores the compiled
kernel under these facts as a key. Triton itself makes the first launch of a key.
"""

from collections.abc import Callable
from functools import partial

import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

hooks = triton.knobs.runtime
_INTEGER = "({n} == 1) + 2 * (not {n} % 16) + 4 * (not -0x80000000 <= {n} < 0x80000000)"


def launched(kernel):
    """Make the later launches of a ``triton.jit`` kernel quick; the interpreter's kernel unchanged.

    Its constexpr parameters come last and are given by keyword, all others by position; parameters
    called ``*_ptr`` are tensors or None, the others numbers.
    """
    return Launched(kernel) if isinstance(kernel, JITFunction) else kernel


class Launched:
    """``kernel[grid](*arguments, **constants)``, as for ``JITFunction``."""

    def __init__(self, kernel: JITFunction):
        runtime = [p.name for p in kernel.params if not p.is_constexpr]
        self.constants = [p.name for p in kernel.params if p.is_constexpr]
        if [p.name for p in kernel.params] != runtime + self.constants:
            raise TypeError(f"{kernel.__name__}: constexpr parameters must come last")
        self.kernel = kernel
        self.classify = classifier(runtime)
        self.compiled: dict[tuple, dict[int, CompiledKernel]] = {}

    def __getattr__(self, name: str):
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments, **constants) -> None:
        """Launch on the current device and stream."""
        known = self.compiled.get((*constants.items(), self.classify(*arguments)))
        device = None if known is None else driver.active.get_current_device()
        compiled = None if known is None else known.get(device)
        if compiled is None or _is_watched(self.kernel):
            self._launch_and_keep(grid, arguments, constants)
            return
        across, down, deep = (*grid, 1, 1)[:3]
        compiled.run(
            across, down, deep, driver.active.get_current_stream(device),
            compiled.function, compiled.packed_metadata, None, None, None, *arguments,
            *(constants[name] for name in self.constants),
        )  # fmt: skip

    def _launch_and_keep(self, grid: tuple[int, ...], arguments: tuple, constants: dict) -> None:
        compiled = self.kernel.run(*arguments, grid=grid, warmup=False, **constants)
        if isinstance(compiled, CompiledKernel):
            key = (*constants.items(), self.classify(*arguments))
            device = driver.active.get_current_device()
            self.compiled.setdefault(key, {})[device] = compiled


def classifier(parameters: list[str]) -> Callable:
    """The function from a kernel's arguments to the facts that Triton compiles for. It is generated
    as source, without a loop."""
    looks = [
        f"{name} is not None and ({name}.dtype, not {name}.data_ptr() % 16)"
        if name.endswith("_ptr")
        else f"-1 if {name}.__class__ is float else {_INTEGER.format(n=name)}"
        for name in parameters
    ]
    scope: dict = {}
    exec(f"def classify({', '.join(parameters)}):\n    return ({', '.join(looks)},)\n", scope)
    return scope["classify"]


def _is_watched(kernel: JITFunction) -> bool:
    """Whether a profiler has a hook on launches."""
    return bool(
        kernel.pre_run_hooks
        or getattr(hooks.launch_enter_hook, "calls", hooks.launch_enter_hook)
        or getattr(hooks.launch_exit_hook, "calls", hooks.launch_exit_hook)
    )
