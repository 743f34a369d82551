"""A tiny input for any model of transformers', made from its config alone."""

import inspect

import torch
from torch import Tensor, nn

ROWS, TOKENS = 2, 5


def why_no_run(base: nn.Module) -> str | None:
    """Why a model cannot run here as it is, or None."""
    if any(tensor.is_meta for tensor in base.parameters()):
        return "weights are on the meta device (or offloaded)"
    if not any(True for _ in base.parameters()):
        return "the model has no weights"
    return None


def synthetic_batch(base: nn.Module) -> dict[str, Tensor]:
    """The keyword arguments of one forward: ``ROWS`` sentences, images or sounds. ValueError where
    the config does not tell what the model takes."""
    config, main = base.config, getattr(base, "main_input_name", "input_ids")
    first = next(base.parameters())
    batch = {main: _made(main, config, first.dtype, first.device)}
    taken = inspect.signature(base.forward).parameters
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        batch["decoder_input_ids"] = _ids(config, first.device)
    if "use_cache" in taken or hasattr(config, "use_cache"):
        batch["use_cache"] = False
    return batch


def _made(main: str, config, dtype: torch.dtype, device: torch.device) -> Tensor:
    if main == "input_ids":
        return _ids(config, device)
    if main == "pixel_values":
        return _numbers((ROWS, getattr(config, "num_channels", 3), *_size(config)), dtype, device)
    if main == "input_features" and hasattr(config, "max_source_positions"):
        frames = 2 * config.max_source_positions
        return _numbers((ROWS, config.num_mel_bins, frames), dtype, device)
    if main == "input_values" and hasattr(config, "conv_stride"):
        return _numbers((ROWS, 4000), dtype, device)
    raise ValueError(f"no input is known for a model that takes {main}")


def _size(config) -> tuple[int, int]:
    size = config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _ids(config, device: torch.device) -> Tensor:
    """Token ids that differ, without those that have a meaning (padding, the end, an image)."""
    text = config.get_text_config()
    special = {
        value for name, value in (*vars(config).items(), *vars(text).items())
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }  # fmt: skip
    known = [i for i in range(min(text.vocab_size, 64)) if i not in special] or [0]
    chosen = [known[(7 * i + 3) % len(known)] for i in range(ROWS * TOKENS)]
    return torch.tensor(chosen, device=device).view(ROWS, TOKENS)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of about size one, the same each time."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * 1.7).view(shape).to(device, dtype)
