"""Where the programs of the CUDA toolkit are."""

import shutil

TOOLKIT = "/usr/local/cuda/bin"


def found(program: str) -> str | None:
    """A program on the path or in the toolkit's folder, or None."""
    return shutil.which(program) or shutil.which(program, path=TOOLKIT)
