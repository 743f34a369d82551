"""The demo's data: real paragraphs, balanced, split by module, nothing given away."""

import pytest

from pelt_fast.tasks import docstrings

PACKAGES = ("torch", "transformers", "sympy", "networkx")


@pytest.fixture(scope="module")
def data():
    return docstrings.build(800, PACKAGES)


def test_it_is_balanced_and_large_enough(data):
    assert len(data.classes) >= docstrings.MIN_CLASSES
    assert len(data.train) + len(data.evaluation) >= 800 - len(data.classes)
    for split in (data.train, data.evaluation):
        counts = [list(split.labels).count(label) for label in range(len(data.classes))]
        assert min(counts) == max(counts)


def test_no_text_is_in_both_halves_or_twice(data):
    texts = [*data.train.texts, *data.evaluation.texts]
    assert len(texts) == len(set(texts))


def test_no_paragraph_names_a_package(data):
    texts = " ".join((*data.train.texts, *data.evaluation.texts)).lower()
    assert not any(name in texts.split() for name in (*PACKAGES, "np", "pytorch"))


def test_modules_are_split_not_paragraphs(monkeypatch):
    """No module gives text to both halves."""
    monkeypatch.setattr(
        docstrings,
        "_paragraphs",
        lambda path: [f"{docstrings._digest(str(path))} {i}" for i in range(9)],
    )
    data = docstrings.build(800, PACKAGES)
    modules = [
        {text.rsplit(" ", 1)[0] for text in split.texts} for split in (data.train, data.evaluation)
    ]
    assert modules[0] and modules[1] and not modules[0] & modules[1]


def test_it_is_the_same_every_time(data):
    assert docstrings.build(800, PACKAGES) == data


def test_too_few_packages_are_refused():
    with pytest.raises(RuntimeError, match="docstrings of 4 of torch, sympy are needed"):
        docstrings.build(800, ("torch", "sympy"))
