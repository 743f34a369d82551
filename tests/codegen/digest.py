"""What docs/codegen.md was made from: ``pytest --quick`` compiles a share of the launches where
nothing of it has changed since, and all of them where something has."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
# what compiles, what is launched, and what is asked of the result
FILES = ("aot", "edge_launches", "launch", "launches", "limits", "races", "routed_launches")


def digest() -> str:
    """Of the kernels, their launches, the limits, and Triton's version."""
    import triton

    paths = sorted((ROOT / "kernels").glob("*.py"))
    paths += [ROOT / "tests" / "codegen" / f"{name}.py" for name in FILES]
    parts = [triton.__version__, *(f"{path.name} {path.read_text()}" for path in paths)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def page_is_of(page: str) -> bool:
    """Whether docs/codegen.md was made from the files that are here."""
    return f"`{digest()}`" in page
