"""Files that are written whole or not at all, and safetensors files that may be damaged."""

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


def write_files(
    folder: Path,
    writers: dict[str, Callable[[Path], object]],
    what: str,
    key: str | None = None,
) -> None:
    """Write every file, or none: first under another name, then moved.

    ``key`` is the file without which the others are no checkpoint, in a format that has no digest.
    It is deleted before the first file is moved and written last. After an interruption there is
    then no checkpoint, and not a mixture of two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: folder / f".{name}.{os.getpid()}.part" for name in writers}
    try:
        for name, write in writers.items():
            write(parts[name])
        if key is not None:
            (folder / key).unlink(missing_ok=True)
        for name, part in sorted(parts.items(), key=lambda item: item[0] == key):
            os.replace(part, folder / name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not save {what} to {folder}: {error}") from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError when it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
