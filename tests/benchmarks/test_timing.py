"""Turns, quartiles, and inputs that no cache holds."""

import torch

from benchmarks import timing

CPU = torch.device("cpu")


def test_steps_take_turns_and_every_repeat_is_kept():
    order = []
    steps = {name: lambda i, name=name: order.append(f"{name}{i}") for name in "ab"}
    found = timing.rounds(steps, repeats=2, warmup=1)
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert [len(times) for times in found.values()] == [2, 2]


def test_quartiles_and_ratios():
    assert timing.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timing.quartiles([7.0]) == (7.0, 7.0, 7.0)
    assert timing.ratios([2.0, 6.0], [1.0, 2.0]) == [2.0, 3.0]


def test_copies_outgrow_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 4000)
    x = torch.randn(500)  # 2000 bytes
    sets = timing.copies((x,), CPU)
    assert len(sets) == 3 and sets[0][0] is x
    assert all(torch.equal(x, other) and other.data_ptr() != x.data_ptr() for (other,) in sets[1:])
    view = torch.randn(2, 8, 4, 4).transpose(1, 2)
    assert timing.copies((view,), CPU)[1][0].stride() == view.stride()


def test_the_cache_of_this_machine_is_known():
    assert timing.cache_bytes(CPU) >= 1 << 20
