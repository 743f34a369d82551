"""The old name of ``pelt_fast.integrations.trainer``."""

from pelt_fast import deprecated


def __getattr__(name: str):
    from pelt_fast.integrations import trainer

    if not hasattr(trainer, name) or name.startswith("_"):
        raise AttributeError(f"module 'pelt_fast.trainer' has no attribute {name!r}")
    deprecated.warn(f"pelt_fast.trainer.{name}", f"pelt_fast.integrations.trainer.{name}")
    return getattr(trainer, name)
