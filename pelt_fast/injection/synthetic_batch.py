"""A tiny input for any model of transformers', made from its config alone."""

import inspect

import torch
from torch import Tensor, nn

ROWS, TOKENS = 2, 5
_PIXELS, _SPECTRA, _SAMPLES = 32, 64, 4000  # where a config has no size


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
    if main == "pixel_values" and "input_ids" in taken:
        batch["input_ids"] = _ids(config, first.device)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        # fewer than the encoder's, so that no length fits both
        batch["decoder_input_ids"] = _ids(config, first.device)[:, : TOKENS - 2]
    if "use_cache" in taken or hasattr(config, "use_cache"):
        batch["use_cache"] = False
    return batch


def token_ids(base: nn.Module) -> Tensor:
    """Ids (ROWS, TOKENS) for a model of text."""
    return _ids(base.config, next(base.parameters()).device)


def _made(main: str, config, dtype: torch.dtype, device: torch.device) -> Tensor:
    if main == "input_ids":
        return _ids(config, device)
    if main == "pixel_values":
        return _numbers((ROWS, *_frames(config), *_image(config)), dtype, device)
    if main == "input_features" and {"max_source_positions", "num_mel_bins"} <= vars(config).keys():
        frames = 2 * config.max_source_positions
        return _numbers((ROWS, config.num_mel_bins, frames), dtype, device)
    if main == "input_features":
        return _numbers((ROWS, _SPECTRA, _mel_bins(config)), dtype, device)
    if main == "input_values" and hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return _numbers((ROWS, config.max_length, config.num_mel_bins), dtype, device)
    if main == "input_values":
        return _numbers((ROWS, _SAMPLES), dtype, device)
    raise ValueError(f"no input is known for a model that takes {main}")


def _frames(config) -> tuple[int, ...]:
    """The frames of a video; none for a model of images."""
    count = getattr(config, "num_frames", None)
    return (count,) if isinstance(count, int) else ()


def _image(config) -> tuple[int, int, int]:
    """Channels, height and width, by the config or by that of its part for images."""
    parts = (config, *(getattr(config, name, None) for name in ("vision_config", "encoder")))
    size = next((s for part in parts if (s := getattr(part, "image_size", None))), _PIXELS)
    channels = next((c for part in parts if (c := getattr(part, "num_channels", None))), 3)
    return (channels, size, size) if isinstance(size, int) else (channels, *tuple(size)[-2:])


def _mel_bins(config) -> int:
    """The numbers in each spectrum, by the config or by that of its part for sound."""
    parts = (config, *(getattr(config, name, None) for name in ("encoder_config", "audio_config")))
    names = (
        "num_mel_bins",
        "feature_size",
        "input_feat_per_channel",
        "feature_projection_input_dim",
    )
    found = (getattr(part, name, None) for part in parts for name in names)
    return next(size for size in found if size)


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
