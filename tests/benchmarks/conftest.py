"""Shapes by name for the benchmarks under test."""

import pytest

from benchmarks import shapes

from .tiny import WIDTHS, shape


@pytest.fixture
def tiny_shapes(monkeypatch) -> None:
    """``tiny-bart`` and the others are shapes by name."""
    for family in WIDTHS:
        monkeypatch.setitem(shapes.SHAPES, f"tiny-{family}", shape(family))
