"""The folder that a run writes: what it must hold before the run begins."""

from pathlib import Path

from pelt_fast.formats.checkpoint import CONFIG_FILE

from .meter import LOG


def check_output(folder: Path, resume: bool) -> None:
    """ValueError for a folder that holds a run already, which would be mixed with the new one. A
    run that resumes needs a checkpoint there."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output: {folder} is a file, a folder is needed")
    newest = _newest(folder)
    if resume and newest is None:
        raise ValueError(f"--resume: {folder} holds no complete checkpoint to continue from")
    if not resume and (newest or any((folder / name).exists() for name in (LOG, CONFIG_FILE))):
        more = "continue it with --resume, or " if newest else ""
        raise ValueError(f"--output: {folder} holds a run already: {more}name another folder")


def _newest(folder: Path) -> Path | None:
    """The newest checkpoint. What reads one is of the extra, which no empty folder needs."""
    if not any(folder.glob("checkpoint-*")):
        return None
    from pelt_fast.integrations.trainer import last_checkpoint

    return last_checkpoint(folder)
