"""Loading models, tokenizers and configs by folder or hub name, with one clear error."""

import sys
from pathlib import Path

from .say import first_line

LONGEST = 160  # characters of another library's reason


def from_pretrained(auto_class, path: str | Path, **options):
    """``auto_class.from_pretrained(path)``. Raises OSError with the name of a missing model, and
    ValueError, in one line, for files that cannot be understood, whatever its reader raises."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
    what = "the tokenizer of" if "Tokenizer" in auto_class.__name__ else "model"
    try:
        return auto_class.from_pretrained(path, **options)
    except OSError as error:
        raise OSError(f"{what} {str(path)!r} cannot be loaded: {first_line(error)}") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        short = reason if len(reason) <= LONGEST else f"{reason[:LONGEST]} ..."
        raise ValueError(f"{what} {str(path)!r} cannot be loaded: {short}") from None
