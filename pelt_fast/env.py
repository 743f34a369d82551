"""Every environment variable the package reads."""

import os


def strict() -> bool:
    """``PELT_FAST_STRICT`` (default 0): 1 turns every fallback to the reference into an error."""
    return os.environ.get("PELT_FAST_STRICT", "0") == "1"
