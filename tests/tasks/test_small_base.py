"""The small base: its mixture, what is held out of it, and that one command makes it."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from pelt_fast.tasks import small_base
from tests.tasks.conftest import SAMPLES


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The samples as a data folder: one collection of short sentences repeats some of the other."""
    root, wmt = tmp_path / "data", SAMPLES / "wmt16"
    english, romanian = ((wmt / f"train.{code}").read_text() for code in ("en", "ro"))
    for name in ("multi30k", "enro", "xsum"):
        (root / name).mkdir(parents=True)
    tatoeba = root / "enro/tatoeba-test-2021-03-30"
    for stem, codes in ((root / "multi30k/train", ("en", "de")), (tatoeba, ("en", "ro"))):
        for code, text in zip(codes, (english, romanian)):
            Path(f"{stem}.{code}.gz").write_bytes(gzip.compress(text.encode()))
    pairs = list(zip(english.splitlines(), romanian.splitlines()))[:5]
    lines = "".join(f"{x}\t{y}\tlicence\n" for x, y in [*pairs, ("Hi.", "Salut!")])
    (root / "enro/manythings_ron.txt.gz").write_bytes(gzip.compress(lines.encode()))
    documents = (SAMPLES / "xsum/train.jsonl").read_bytes()
    (root / "xsum/xsum_docs_merged.jsonl.gz").write_bytes(gzip.compress(documents))
    monkeypatch.setattr(small_base, "SCORED", 3)
    return root


def test_the_sentences_that_score_are_in_no_training_row(folder):
    mixture, scored = small_base.rows(folder)
    assert len(set(scored["source"])) == 3
    short = [x for x in mixture["source"] if x.startswith("<ro> ")]
    assert not set(scored["source"]) & set(short)
    lines = (SAMPLES / "wmt16/train.en").read_text().splitlines()
    assert len(short) + len(scored) == len(lines) + 1, "pairs of both collections are taken once"
    again, _ = small_base.rows(folder)
    assert again["source"] == mixture["source"]


def test_one_command_makes_a_model_and_says_what_it_is_worth(folder, tmp_path):
    output = small_base.build(folder, tmp_path / "base", steps=3)
    about = json.loads((output / small_base.ABOUT).read_text())
    assert about["steps"] == 3 and about["sentences"] == 3
    assert {"bleu", "loss"} <= set(about["metrics"])
    model = AutoModelForSeq2SeqLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("<ro> The bridge is closed.", return_tensors="pt").input_ids
    assert ids[0, 1] == tokenizer.convert_tokens_to_ids("<ro>") and ids[0, -1] == 2
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)
    assert not any("_pelt" in name for name, _ in model.named_modules())


def test_a_missing_file_is_named(folder, tmp_path):
    (folder / "enro/manythings_ron.txt.gz").unlink()
    with pytest.raises(FileNotFoundError, match="manythings_ron"):
        small_base.build(folder, tmp_path / "base", steps=1)
    assert not (tmp_path / "base").exists()
