"""Peak memory of a step: the allocator's on a GPU, the resident set's on a CPU."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which memory rises above its level before ``work()``; None where the system does not
    say (a CPU without Linux's /proc)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed before must not hide new memory
        CLEAR.write_text("5")  # reset the peak
        before = _status("VmRSS")
        work()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def standing(model: torch.nn.Module) -> int:
    """Bytes that stay between steps: weights, and AdamW's two moments of the trained parameters."""
    everything = (*model.parameters(), *model.buffers())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in everything}
    weights = sum(storage.nbytes() for storage in storages.values())
    return weights + 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
