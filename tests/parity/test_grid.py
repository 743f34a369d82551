"""Every architecture of the table under every method: refused with its reason, or all holds."""

import pytest
import torch

from tests.parity import grid, report
from tests.small import MORE

CELLS = [(a, m) for a in MORE for m in grid.METHODS]
# what is refused, and the words the reason must have
REFUSED = {
    "bitfit": "has no biases",
    "deberta-v2": "computes its attention itself",
    "gemma2": "attn_logit_softcapping=50.0",
    "mixtral": "experts that a router chooses",
}


@pytest.mark.parametrize("architecture, method", CELLS)
def test_a_cell_holds_or_says_why_not(architecture, method):
    reason = grid.refusal(architecture, method)
    if reason is None:
        grid.hold(architecture, method)
    else:
        known = [REFUSED[key] for key in (architecture, method) if key in REFUSED]
        assert any(words in reason for words in known), reason


def test_the_committed_table_has_every_cell_and_its_reason():
    text = report.TABLE.read_text()
    for architecture in sorted(grid.ARCHITECTURES):
        cells = {m: grid.refusal(architecture, m) for m in grid.METHODS}
        assert report.row(architecture, cells) in text, architecture
        assert all(reason in text for reason in filter(None, map(report.short, cells.values())))


def test_the_budget_catches_what_is_wrong():
    exact = {"logits": torch.randn(4, 3).double(), "w": torch.randn(5).double()}
    same = {key: value.float() for key, value in exact.items()}
    off = {**same, "w": same["w"] * 1.0001}
    assert grid.past_budget(same, same, exact) is None
    assert grid.past_budget(off, same, exact)[0] == "w"
    missing = {**same, "w": torch.full((5,), torch.nan)}
    assert grid.past_budget(missing, same, exact) is not None
