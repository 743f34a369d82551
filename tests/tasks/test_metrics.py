"""Scores against numbers worked out by hand and against the libraries' own examples."""

import pytest

from pelt_fast.tasks.metrics import accuracy, bleu, rouge
from pelt_fast.tasks.romanian import normalise


def test_accuracy():
    assert accuracy([1, 0, 1, 1], [1, 1, 1, 0]) == 50


def test_rouge_by_hand():
    found = rouge(["the cat sat"], ["the cat sat down today"])
    # three words of five: precision 1, recall 3/5; two bigrams of four
    assert found["rouge1"] == pytest.approx(75) and found["rougeL"] == pytest.approx(75)
    assert found["rouge2"] == pytest.approx(100 * 2 * 1 * 0.5 / 1.5)


def test_bleu_of_equal_and_of_strange_texts():
    same = ["The house is big and the garden is small ."]
    assert bleu(same, same)["bleu"] == pytest.approx(100)
    assert bleu(["nothing of it at all here"], same)["bleu"] < 5


@pytest.mark.parametrize("text, wanted", [
    ("Bună dimineața !", "Buna dimineata!"),
    ("Ştefan şi ţara", "Stefan si tara"),  # cedillas
    ("Ștefan și țara", "Stefan si tara"),  # commas
    ("„Da”, a spus el…", '"Da", a spus el...'),
    ("în  România – azi", "in Romania - azi"),
    ("I\u0302ncet", "Incet"),  # a combining circumflex
])  # fmt: skip
def test_romanian_is_normalised(text, wanted):
    assert normalise(text) == wanted


def test_diacritics_do_not_count_once_normalised():
    reference = ["Bună dimineața, casa este foarte mare acum."]
    bare = ["Buna dimineata, casa este foarte mare acum."]
    found = bleu(bare, reference)
    assert found["bleu_normalised"] == pytest.approx(100) and found["bleu"] < 90
