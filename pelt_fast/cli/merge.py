"""Fold a saved method into its base: a plain model that every tool loads."""

import argparse
import os
import shutil
import sys
from pathlib import Path

from pelt_fast.cli.arguments import add_saved, refuse_full


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The method, its base, and where the model goes."""
    add_saved(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="a new folder")
    widen = "also fold parallel adapters with the FFN's own activation"
    parser.add_argument("--widen-ffn", action="store_true", help=widen)


def run(options: argparse.Namespace) -> int:
    """Load, merge, save. What cannot be folded is refused before the base is read, or before
    anything is written."""
    from pelt_fast.tasks.saved import load_saved

    _refuse_unlinear(options.folder)
    refuse_full(options.output)
    model, path = load_saved(options.folder, options.model)
    _fold(model, options.widen_ffn)
    tokenizer = _tokenizer(path)
    part = options.output.with_name(f".{options.output.name}.{os.getpid()}.part")
    try:
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        os.replace(part, options.output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{type(model).__name__} with {options.folder} folded in: {options.output}")
    return 0


def _refuse_unlinear(folder: Path) -> None:
    """ValueError for a method with a form that no weight can hold."""
    from pelt_fast.formats.checkpoint import read_config

    config, _ = read_config(folder)
    never = sorted({m.form for m in config.modifications if m.form in ("prefix", "prompt")})
    if never:
        raise ValueError(
            f"{folder} holds {config.name!r}: a {never[0]} is not linear and stays beside its base"
        )


def _fold(model, widen_ffn: bool) -> None:
    """Fold every site of a model; ValueError with the reasons where one cannot be."""
    import pelt_fast
    from pelt_fast.compose.why_not_merged import why_not
    from pelt_fast.injection.record import injection_of

    injection = injection_of(model)
    reasons = sorted({why_not(site, widen_ffn) or "" for site in injection.sites} - {""})
    if reasons:
        raise ValueError(f"{injection.config.name!r} cannot be folded whole: {'; '.join(reasons)}")
    if injection.sites:  # a method without sites trained the base's own parameters
        pelt_fast.merge(model, widen_ffn=widen_ffn, keep_base=False)


def _tokenizer(path: str):
    """The base's tokenizer; None, which is said, where it has none."""
    from pelt_fast.tasks.saved import load_tokenizer_of

    try:
        return load_tokenizer_of(path)
    except (OSError, ValueError):
        print(f"{path} has no tokenizer: none is written", file=sys.stderr)
        return None
