"""Token lengths of real text, for the rows of a batch.

Without a file the text is torch's own docstrings: a docstring is the source, its first paragraph
the summary. Lengths are in words and marks, about what a subword tokenizer gives.
"""

import ast
import re
from pathlib import Path

import torch

LEAST = 24  # tokens of a source that counts as a text
WORD = re.compile(r"\w+|[^\w\s]")


def lengths(path: Path | None = None) -> list[tuple[int, int]]:
    """(source, target) lengths of every text, shortest source first.

    ``path`` has one text on each line, and after a tab its summary; without a tab the first
    sentence is the summary. ValueError when no line is long enough.
    """
    texts = _docstrings() if path is None else map(_line, path.read_text().splitlines())
    found = sorted((n, m) for n, m in ((_count(a), _count(b)) for a, b in texts) if n >= LEAST)
    if not found:
        raise ValueError(f"{path}: no line of {LEAST} words or more")
    return found


def batch(rows: int, source: int, target: int, texts: list[tuple[int, int]]) -> torch.Tensor:
    """(rows, 2) lengths at even quantiles of the distribution, cut to ``source`` and ``target``,
    which the longest rows fill: a batch is as wide as its longest row."""
    places = [round((i + 0.5) / rows * (len(texts) - 1)) for i in range(rows)]
    most = torch.tensor([source, target])
    found = torch.tensor([texts[i] for i in places]).clamp(min=1).minimum(most)
    for column in (0, 1):
        found[found[:, column].argmax(), column] = most[column]
    return found


def _count(text: str) -> int:
    return len(WORD.findall(text))


def _line(line: str) -> tuple[str, str]:
    text, _, summary = line.partition("\t")
    return text, summary or re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]


def _docstrings():
    folder = Path(torch.__file__).parent
    for path in (*sorted((folder / "nn").rglob("*.py")), *sorted((folder / "optim").rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                yield text, text.split("\n\n")[0]
