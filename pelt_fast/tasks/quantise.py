"""A base with 4-bit (nf4) or 8-bit weights, by bitsandbytes."""

import importlib.util
import logging
import os

import torch

from .recipe import Recipe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def quantisation(recipe: Recipe) -> dict:
    """The keywords of ``from_pretrained`` for the recipe's ``quantize``; {} without one. Raises
    RuntimeError when bitsandbytes is not installed."""
    if not recipe.quantize:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RuntimeError(
            f"quantize={recipe.quantize!r} needs bitsandbytes: pip install 'pelt_fast[quantised]'"
        )
    from transformers import BitsAndBytesConfig

    dtype = DTYPES[recipe.precision]
    if recipe.quantize == "int8":
        # each product of each step would say that its input is cast to fp16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        found = BitsAndBytesConfig(load_in_8bit=True)
    else:
        found = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    return dict(quantization_config=found, device_map={"": device}, dtype=dtype)
