"""The models and methods of the saved files: the same for who writes them and who reads them.

Nothing here may change: the committed files were made from it. A later version adds cases.
"""

import zlib
from pathlib import Path

import torch
from torch import nn

from tests import small

SAVED = Path(__file__).parent
# the names of the files are part of the format
METHOD_FILE = "pelt_model.safetensors"
TRAINED_FILE = "pelt_training.safetensors"
EXPECTED_FILE = "expected.safetensors"  # input_ids, attention_mask, logits
NAMES_FILE = "names.json"
# method: the model that carries it
CASES = {
    "bitfit": small.bert,
    "houlsby": small.roberta,
    "learned_scale_parallel_adapter": small.bart,
    "lora": small.llama,
    "mam": small.bart,
    "pfeiffer": small.roberta,
    "prefix": small.bert,
    "prompt": small.roberta,
}
# those with a file of what trains, as a Trainer's checkpoint has it
TRAINED = ("lora", "mam")
SIZES = dict(size=3, mlp_dim=6)


def base(method: str) -> nn.Module:
    """The model of a case, in evaluation. Its weights come from a formula, not from a seed: no
    version of torch or transformers draws them in another order."""
    model = CASES[method]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            phase = zlib.crc32(name.encode()) % 1000
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            values = 0.2 * torch.sin(0.37 * index.square() + phase)
            values = values + 1.0 if "norm" in name.lower() and name.endswith("weight") else values
            parameter.copy_(values.view_as(parameter))
    return model


def names(plain: nn.Module, injected: nn.Module) -> dict[str, list[str]]:
    """What a ``state_dict`` and an optimizer of an injected model rest on: the names and shapes
    that the method adds to the state and takes from it, and the order of what trains."""
    before, after = ({name: tuple(t.shape) for name, t in model.state_dict().items()}
                     for model in (plain, injected))  # fmt: skip
    return {
        "added": [f"{name} {after[name]}" for name in after if name not in before],
        "taken": [f"{name} {before[name]}" for name in before if name not in after],
        "trainable": [name for name, p in injected.named_parameters() if p.requires_grad],
    }
