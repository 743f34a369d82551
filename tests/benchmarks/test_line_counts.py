"""The table of docs/line-counts.md is that of its blocks."""

from benchmarks.line_counts import LIBRARIES, PAGE, counts, lines_of, render

JOB = """# Page

<!-- line counts -->
old
<!-- /line counts -->

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
    assert "| A job | 2 | 1 | - |" in render(JOB) and "old" not in render(JOB)
    assert render(render(JOB)) == render(JOB)
    assert lines_of("\n# a\n  # b\n") == 0


def test_the_page_shows_what_its_blocks_have():
    text = PAGE.read_text()
    assert render(text) == text, "run python -m benchmarks.line_counts"
    jobs = counts(text)
    assert len(jobs) == 10
    assert all(
        {"pelt_fast", "adapters"} <= lines.keys() <= set(LIBRARIES) for lines in jobs.values()
    )
