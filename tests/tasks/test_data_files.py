"""Files of rows that are empty, damaged or of another format: one line that names the file."""

import gzip
import json

import pytest

from pelt_fast import cli
from pelt_fast.tasks.data import load
from pelt_fast.tasks.data_files import PART
from pelt_fast.tasks.pretrained import from_pretrained
from pelt_fast.tasks.registry import TASKS
from tests.tasks import chat

pytest.importorskip("datasets")

GOOD = {
    "instruct": {"prompt": "a", "completion": "b"}, "classification": {"text": "a", "label": 1},
    "generation": {"source": "a", "target": "b"},
}  # fmt: skip
EMPTY, OBJECT = "is empty", "a row of JSON is an object, and the file begins with"
FILES = [
    ("jsonl", b"", EMPTY), ("jsonl", b"\n \n" + b" " * PART, EMPTY), ("json", b"", EMPTY),
    ("json", b"[]", EMPTY), ("csv", b"", EMPTY), ("tsv", b"\n", EMPTY),
    ("csv", b"text,label\n", EMPTY), ("jsonl.gz", gzip.compress(b""), EMPTY),
    ("jsonl", b"null\nnull\n", OBJECT),  # ended the process
    ("jsonl", b"5\n6\n", OBJECT), ("json", b'"a"', OBJECT), ("jsonl", b"\x89PNG\r\n", OBJECT),
    ("jsonl", '{"text": "a"}'.encode("utf-16"), OBJECT),
    ("jsonl", gzip.compress(b'{"text": "a"}'), OBJECT), ("jsonl", b"[1, 2]\n[3, 4]\n", "read: "),
    ("jsonl.gz", b'{"text": "a"}', "cannot be read: Not a gzipped file"),
    ("jsonl.gz", gzip.compress(b'{"text": "a"}' * 99)[:30], "cannot be read: Compressed file ended"),
    ("jsonl", '{"text": "é"}\n'.encode("latin-1"), "Invalid UTF8"),
    ("csv", bytes(range(256)), "cannot be read"), ("jsonl", b'{"text"', "cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize("task", GOOD)
@pytest.mark.parametrize("suffix, content, told", FILES, ids=lambda value: repr(value)[:24])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_file_that_is_no_rows_is_named(task, suffix, content, told, split, tmp_path):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.csv").write_text(",".join(GOOD[task]) + "\na,1\n")
    (tmp_path / f"{split}.csv").unlink()
    (tmp_path / f"{split}.{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match="--data: ") as refused:
        load(TASKS[task], tmp_path)
    message = str(refused.value)
    assert f"{split}.{suffix} " in message and told in message and "\n" not in message


@pytest.mark.parametrize(
    "content, told", [(b"", "train.ro is empty"), (b"\xe9\n", "train.ro cannot")]
)
def test_a_side_of_parallel_text_is_named(content, told, tmp_path):
    for split in ("train", "dev"):
        (tmp_path / f"{split}.en").write_text("one\n")
        (tmp_path / f"{split}.ro").write_text("unu\n")
    (tmp_path / "train.ro").write_bytes(content)
    with pytest.raises(ValueError, match=told):
        load(TASKS["wmt16"], tmp_path)


@pytest.mark.parametrize("task, column", [("classification", "text"), ("generation", "target")])
@pytest.mark.parametrize("value, told", [
    (None, "row 3 of train has no {}: text is needed"),
    (5, "--data: {} of train holds values of "), (["a", "b"], "--data: {} of train holds values of "),
])  # fmt: skip
def test_a_column_of_text_holds_text(task, column, value, told, tmp_path):
    rows = [GOOD[task], GOOD[task], GOOD[task] | {column: value}]
    if value is not None:
        rows = [GOOD[task] | {column: value}] * 3
    chat.write(tmp_path, rows)
    with pytest.raises(ValueError, match=told.format(column)):
        load(TASKS[task], tmp_path)


def test_white_space_and_a_mark_of_its_bytes_may_come_first(tmp_path):
    line = json.dumps(GOOD["instruct"]).encode() + b"\n"
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + line * 4)
    (tmp_path / "validation.json").write_bytes(b"\n  " * PART + line * 2)
    found = load(TASKS["instruct"], tmp_path)
    assert (len(found.train), len(found.validation)) == (4, 2)


@pytest.mark.parametrize(
    "command", [["train", "--task", "instruct", "--max-length", "96"], ["init"]]
)
def test_the_commands_say_it_in_one_line(command, tmp_path, capsys):
    model = chat.model_folder(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("")
    given = ["--model", model, "--data", str(tmp_path), "--output", str(tmp_path / "out.yaml")]
    assert cli.main([*command, *given]) == 2
    assert capsys.readouterr().err == f"pelt-fast {command[0]}: --data: train.jsonl is empty\n"


def test_an_error_that_says_nothing_is_named_by_its_kind():
    class Silent:
        @staticmethod
        def from_pretrained(path):
            raise FileNotFoundError

    with pytest.raises(OSError, match="model 'x' cannot be loaded: FileNotFoundError"):
        from_pretrained(Silent, "x")
