"""compare.py: what is worse beyond its noise, and files that are none."""

import copy
import json

from benchmarks.compare import main
from benchmarks.layer import MODES

FROZEN, OURS = [1.0, 1.1, 1.0, 1.05, 0.95], [1.2, 1.3, 1.25, 1.2, 1.22]
RESULT = {
    "machine": {"time": "2026-01-01"}, "part": "layer", "finished": True,
    "entries": [
        dict(layer="l", provider="frozen", mode=MODES[1], seconds=FROZEN, saved_bytes=0),
        dict(layer="l", provider="ours", mode=MODES[1], seconds=OURS, saved_bytes=1000),
    ],
}  # fmt: skip


def write(path, result):
    path.write_text(json.dumps(result))
    return str(path)


def changed(factor=1.0, machine=1.0, saved=1000):
    result = copy.deepcopy(RESULT)
    floor, ours = result["entries"]
    floor["seconds"] = [machine * t for t in FROZEN]
    ours.update(seconds=[machine * factor * t for t in OURS], saved_bytes=saved)
    return result


def test_slower_and_bigger_are_named_and_noise_is_not(tmp_path, capsys):
    a = write(tmp_path / "a.json", RESULT)
    for result, code, said in (
        (changed(1.02), 0, "0 changes"),
        (changed(1.5), 1, "worse   1.50 x  time of l, ours"),
        (changed(0.5), 0, "better  0.50 x  time of l, ours"),
        (changed(machine=3.0), 0, "0 changes"),  # another machine, the same ratios
        (changed(saved=2000), 1, "worse   2.00 x  saved_bytes of l, ours"),
    ):
        assert main([a, write(tmp_path / "b.json", result)]) == code
        assert said in capsys.readouterr().out


def test_a_file_that_does_not_parse_is_named(tmp_path, capsys):
    a = write(tmp_path / "a.json", RESULT)
    (tmp_path / "b.json").write_text("{broken")
    assert main([a, str(tmp_path / "b.json")]) == 2
    assert "b.json is not a result file" in capsys.readouterr().err
    other = write(tmp_path / "c.json", RESULT | {"part": "model"})
    assert main([a, other]) == 2 and "of part 'layer'" in capsys.readouterr().err
    assert main([a, str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
