"""What runs where: the only place with rules about devices and dtypes, and where a fallback speaks.

``plan(...)`` names what an op will run for an input and, when that is the reference, the reason.
"""

import functools
import logging
from dataclasses import dataclass

import torch

from pelt_fast import env

from .library import active_backend

logger = logging.getLogger("pelt_fast")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Plan:
    """What runs, and why it is no more than the reference (None otherwise)."""

    name: str
    reason: str | None = None


def plan(op: str, device: torch.device, attention_dropout: float = 0.0) -> Plan:
    """The plan of ``op`` ("lora", "adapter", "ffn" or "prefix") on ``device``."""
    if active_backend() == "reference":
        return Plan("reference", "backend('reference') was asked for")
    kind = device.type
    if op == "prefix":
        if kind in ("cpu", "meta"):
            return Plan("blocked" if attention_dropout > 0 else "flash + merge")
        return Plan("reference", f"prefix attention has no plan for device {kind!r} yet")
    if kind in ("cpu", "cuda", "meta"):
        return Plan("accumulate")
    return Plan("reference", f"{op} has no plan for device {kind!r}")


def announce(op: str, device: torch.device) -> None:
    """Say once why ``op`` falls back to the reference; raise it under ``PELT_FAST_STRICT=1``."""
    if active_backend() == "reference":
        return
    reason = plan(op, device).reason
    if reason is not None:
        fall_back(f"{op}: running the reference, because {reason}")


def fall_back(message: str) -> None:
    """Log ``message`` once per process, or raise it under ``PELT_FAST_STRICT=1``."""
    if env.strict():
        raise RuntimeError(f"{message} (PELT_FAST_STRICT=1 makes this an error)")
    if not torch.compiler.is_compiling():
        _say_once(message)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
