"""How docs/api.md shows a signature and a docstring."""

from benchmarks.docstring_page import markdown, signature

DOCSTRING = """Add an update to ``y`` (see :func:`pelt_fast.inject`).

More about it.

Args:
    y: the output, (M, N).
    scale (float): the factor s,
        a number.
    *others: more tensors.

Returns:
    The sum, (M, N).

Raises:
    ValueError: when shapes differ.

Example:
    >>> add(y, 2.0)
    y
"""
SHOWN = """Add an update to `y` (see `inject`).

More about it.

**Args**

- `y`: the output, (M, N).
- `scale` (float): the factor s, a number.
- `*others`: more tensors.

**Returns**: The sum, (M, N).

**Raises**

- `ValueError`: when shapes differ.

**Example**

```python no-run: from a docstring
>>> add(y, 2.0)
y
```"""


def test_sections_are_lists_and_code():
    assert markdown(DOCSTRING) == SHOWN


def test_text_without_sections_stays():
    assert markdown("One line.\n\nArguments as in ``other``:\n  indented") == (
        "One line.\n\nArguments as in `other`:\n  indented"
    )


def test_a_long_signature_has_a_parameter_a_line():
    def short(x: int, *, y: "dict[str, int] | None" = None) -> "int": ...

    def long(alpha: dict[str, int], beta: tuple[int, ...] = (1, 2), *, gamma_delta_epsilon: str = "a, b") -> str: ...  # fmt: skip

    assert signature("short", short) == "short(x: int, *, y: dict[str, int] | None = None) -> int"
    assert signature("long", long).splitlines() == [
        "long(",
        "    alpha: dict[str, int],",
        "    beta: tuple[int, ...] = (1, 2),",
        "    *,",
        "    gamma_delta_epsilon: str = 'a, b',",
        ") -> str",
    ]
