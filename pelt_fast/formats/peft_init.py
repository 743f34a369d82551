"""Initialisations of LoRA after which PEFT changes the base when it loads a file.

PiSSA and OLoRA start from a part of the weight itself, and PEFT subtracts that part from the base.
Here the base does not change, for eject and for other methods. Additional factors beside the
trained ones subtract the part: W + s (B A - B0 A0). PEFT converts its files in the same way.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# inits that do not change the base
PLAIN = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_CONVERT = (
    "convert the file with PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion="
    "...)"
)
# inits whose first factors cannot be computed from the base and the file
_LOST = {
    "corda": "CorDA's first factors come from data",
    "lora_ga": "LoRA-GA's first factors come from gradients",
    "loftq": "LoftQ quantised the base",
}


def check_init(init) -> None:
    """ValueError for an init whose changed base cannot be computed here."""
    if init in PLAIN or init in ("pissa", "olora"):
        return
    name = str(init).lower()
    if name.startswith("pissa"):
        why = "its first factors were drawn, and PEFT draws others when it loads"
    elif name in _LOST:
        why = _LOST[name]
    else:
        raise ValueError(f"init_lora_weights={init!r}: this pelt_fast does not know it")
    raise ValueError(f"init_lora_weights={init!r}: {why}, and the base is without them: {_CONVERT}")


@torch.no_grad()
def first_factors(init, layer: nn.Module, name: str, rank: int, scale: float):
    """A0 (R, K) and B0 (N, R) that PEFT subtracts from the layer's weight when it loads; None if it
    does not change the weight."""
    if init in PLAIN:
        return None
    weight = getattr(layer, "weight", None)
    plain = type(layer) in (nn.Linear, Conv1D) and type(weight) is nn.Parameter
    if not plain or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"init_lora_weights={init!r} takes a part out of the weight of {name}, which is no"
            f" plain matrix of up to 32 bits: {_CONVERT}"
        )
    weight = weight.detach().float()
    if init == "pissa":
        return _singular(weight.t() if type(layer) is Conv1D else weight, rank, scale)
    if type(layer) is Conv1D:
        raise ValueError(f"init_lora_weights={init!r} on {name}, a Conv1D: {_CONVERT}")
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def _singular(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root
