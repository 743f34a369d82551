"""Loading models, tokenizers and configs by folder or hub name, with one clear error."""

import sys
from pathlib import Path


def from_pretrained(auto_class, path: str | Path, **options):
    """``auto_class.from_pretrained(path)``. Raises OSError with the name of a missing model."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
    try:
        return auto_class.from_pretrained(path, **options)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"model {str(path)!r} cannot be loaded: {reason}") from None
