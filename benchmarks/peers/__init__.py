"""The peers, one file each. A file has ``layer(problem)`` and, if the peer has whole models,
``model(base, config)``: iterators of providers, or of ``Absent`` with the reason."""

from collections.abc import Iterator

from benchmarks.problems import Absent, Problem, Provider
from benchmarks.whole import Trained

from . import compiled, concatenation, flex, frozen, full, liger, ours, peft, plain, unsloth

PEERS = {
    "frozen": frozen,
    "full": full,
    "pelt_fast": ours,
    "plain": plain,
    "compile": compiled,
    "peft": peft,
    "concatenation": concatenation,
    "flex": flex,
    "liger": liger,
    "unsloth": unsloth,
}
QUICK = ("frozen", "full", "pelt_fast", "plain", "peft", "concatenation")


def chosen(names: list[str] | None) -> list[str]:
    """The requested peers, always with the frozen floor; ValueError lists the known ones."""
    names = list(PEERS) if names is None else names
    for name in names:
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}: choose {', '.join(PEERS)}")
    return list(dict.fromkeys(["frozen", *names]))


def providers(problem: Problem, names: list[str]) -> Iterator[Provider | Absent]:
    """The providers of ``names`` that solve a problem, the frozen floor first."""
    for name in names:
        yield from PEERS[name].layer(problem)


def models(base, config, injected, names: list[str]) -> Iterator[Trained | Absent]:
    """The providers of ``names`` that train a whole model with the method."""
    for name in names:
        if hasattr(PEERS[name], "model"):
            yield from PEERS[name].model(base, config, injected)
