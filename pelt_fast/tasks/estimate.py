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
# bytes of a weight with its scales: blocks of 64 with 8-bit scales; a scale a row
QUANTISED_BYTES = {"nf4": 0.516, "int8": 1.0}
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


def estimate(model: nn.Module, recipe: Recipe, device: str | None = None) -> Estimate:
    """The :class:`Estimate` of an injected model, on any device, meta included. ``device`` is the
    type of the one that it will run on; None is the one that it is on."""
    count = pelt_fast.count_parameters(model)
    on_cpu = (device or next(model.parameters()).device.type) == "cpu"
    width = 4 if on_cpu or recipe.precision == "fp32" else 2  # on a CPU the wider of the two
    lengths = recipe.max_length + recipe.max_target * task_of(recipe.task).translates
    tokens = recipe.batch_tokens or recipe.batch_size * lengths
    trained = 4 * count.trainable * 3  # a gradient and two moments, in fp32
    frozen = 0 if injection_of(model).config.is_full else count.base
    flops = tokens * recipe.accumulation * (4 * frozen + 6 * count.kept)
    total = _weights(model, recipe) + trained + _activations(model, recipe, tokens, width)
    return Estimate(count.base, count.trainable, count.percent, total, float(flops))


def _weights(model: nn.Module, recipe: Recipe) -> int:
    """Bytes of the weights. A model that is to be quantised keeps its embeddings and its head."""
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    if not recipe.quantize or getattr(model, "is_quantized", False):
        return whole
    kept = {id(module) for module in (model.get_output_embeddings(),) if module is not None}
    linears = [m for m in model.modules() if type(m) is nn.Linear and id(m) not in kept]
    weights = {id(m.weight): m.weight for m in linears}.values()
    saved = sum(w.numel() * (w.element_size() - QUANTISED_BYTES[recipe.quantize]) for w in weights)
    return int(whole - saved)


def _activations(model: nn.Module, recipe: Recipe, tokens: int, width: int) -> int:
    """Bytes kept for backward, or for the logits of an evaluation where these are more: TRL makes
    the logits of a causal model's training in pieces."""
    config = model.config
    if not hasattr(config, "num_hidden_layers"):
        config = config.get_text_config()
    decoder = (getattr(config, name, 0) or 0 for name in ("decoder_layers", "num_decoder_layers"))
    layers = config.num_hidden_layers + max(decoder)
    widths = layers + _WIDTHS if recipe.gradient_checkpointing else layers * _WIDTHS
    kept = tokens * widths * config.hidden_size * width
    task = task_of(recipe.task)
    if task.causal:
        whole = width + 4 * (width == 2)  # accelerate keeps 16-bit logits and makes fp32 ones
        rows = recipe.eval_batch_size * whole + 2 * 4  # of one row two copies in fp32
        return max(kept, rows * recipe.max_length * config.vocab_size)
    return kept + 2 * (tokens * config.vocab_size * 4 if task.generates else 0)


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
