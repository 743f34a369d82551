"""The table of docs/line-counts.md is that of its blocks."""

from benchmarks.line_counts import LIBRARIES, PAGE, counts, lines_of, table

JOB = """# Page

## 1. A job

pelt_fast:

<!-- setup
hidden = 1
-->
```python
import a

# a comment
a.b()
```

PEFT:

```python no-run: a reason
a()
```
"""


def test_lines_are_counted_without_blanks_comments_and_hidden_setup():
    assert counts(JOB) == {"A job": {"pelt_fast": 2, "PEFT": 1}}
    assert table(JOB).splitlines()[2:] == ["| A job | 2 | 1 | - |"]
    assert lines_of("\n# a\n  # b\n") == 0


def test_the_page_has_ten_jobs_in_known_libraries():
    jobs = counts(PAGE.read_text())
    assert len(jobs) == 10
    assert all(
        {"pelt_fast", "adapters"} <= lines.keys() <= set(LIBRARIES) for lines in jobs.values()
    )
