"""An estimate of the cost of a run: parameters, memory, seconds of a step.

Memory: the weights, the gradients and Adam's two moments of the trained parameters, and the
activations kept for backward. Flops of a step: for each weight and token 2 forward, 2 backward to
the input, and 2 more if the weight trains. Seconds are at ``EFFICIENCY`` of a GPU's dense 16-bit
peak: a rough figure; ``pelt-fast bench predict`` counts bytes op by op.
"""

from dataclasses import dataclass

import torch
from torch import nn

import pelt_fast
from pelt_fast.injection.record import injection_of

from .recipe import Recipe
from .registry import task_of

EFFICIENCY = 0.4
# dense bf16 / fp16 peak in TFLOP/s and memory in GB, from the makers' data sheets
DEVICES = {"h200": (989, 141), "h100": (989, 80), "a100": (312, 80), "l40s": (362, 48),
           "rtx4090": (165, 24), "mi300x": (1307, 192)}  # fmt: skip
# activations kept for a token in a layer, in widths: the inputs of six products, two norms, and
# twice four widths for the FFN's activation
_WIDTHS = 16


@dataclass(frozen=True)
class Estimate:
    """base and trainable parameters, bytes in all, flops of one optimizer step."""

    base: int
    trainable: int
    percent: float
    bytes: int
    flops: float

    def seconds(self, device: str) -> float:
        """Seconds of one optimizer step on a GPU of ``DEVICES``."""
        return self.flops / (DEVICES[device][0] * 1e12 * EFFICIENCY)


def estimate(model: nn.Module, recipe: Recipe) -> Estimate:
    """The :class:`Estimate` of an injected model, on any device, meta included."""
    count = pelt_fast.count_parameters(model)
    config, on_cpu = model.config, next(model.parameters()).device.type == "cpu"
    width = 4 if on_cpu or recipe.precision == "fp32" else 2  # on a CPU the wider of the two
    lengths = recipe.max_length + recipe.max_target * task_of(recipe.task).translates
    tokens = recipe.batch_tokens or recipe.batch_size * lengths
    decoder = (getattr(config, name, 0) or 0 for name in ("decoder_layers", "num_decoder_layers"))
    layers = config.num_hidden_layers + max(decoder)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = 4 * count.trainable * 3  # a gradient and two moments, in fp32
    kept = tokens * layers * config.hidden_size * _WIDTHS * width
    vocabulary = tokens * config.vocab_size * 4 if task_of(recipe.task).generates else 0
    frozen = 0 if injection_of(model).config.is_full else count.base
    flops = tokens * recipe.accumulation * (4 * frozen + 6 * count.kept)
    return Estimate(count.base, count.trainable, count.percent,
                    weights + trained + kept + 2 * vocabulary, float(flops))  # fmt: skip


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a device; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        with open("/proc/meminfo") as file:
            found = dict(line.split(":") for line in file)
        return 1024 * int(found["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return None
