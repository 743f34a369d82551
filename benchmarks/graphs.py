"""A training step replayed as a CUDA graph: the device's own time, without the host's work."""

import statistics

import torch
from torch import Tensor

from . import whole
from .whole import Trained

REPLAYS = 7


def graph_seconds(trained: Trained, batch: dict[str, Tensor]) -> tuple[float | None, str | None]:
    """The median seconds of a replayed step, or None and the reason. A provider that waits for the
    host cannot be captured."""
    trained.model.train()
    stream = torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream):
            return _median(_captured(trained, batch)), None
    except Exception as error:  # a provider that cannot be captured is a result
        _forget_capture()
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    finally:
        torch.cuda.synchronize()
        trained.model.zero_grad(set_to_none=True)


def _forget_capture() -> None:
    """Give the random generator a new state. After a failed capture its state stays that of a
    capture, and every later dropout would raise."""
    for index, generator in enumerate(torch.cuda.default_generators):
        fresh = torch.Generator(f"cuda:{index}")
        fresh.manual_seed(generator.initial_seed())
        generator.graphsafe_set_state(fresh)


def _captured(trained: Trained, batch: dict[str, Tensor]) -> torch.cuda.CUDAGraph:
    """The graph of forward, backward and AdamW on ``batch``, captured after some steps that do the
    work of the first step."""
    optimizer = None
    if trained.parameters:
        optimizer = torch.optim.AdamW(trained.parameters, lr=1e-5, capturable=True)

    def step() -> None:
        with trained.around():
            whole.loss_of(trained, batch).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    return graph


def _median(graph: torch.cuda.CUDAGraph) -> float:
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)
