"""README's tables are what the committed results say; the benchmarks print theirs."""

import re

from benchmarks import api, figures, report, study
from benchmarks.common import merged, newest, newest_path


def test_readme_is_generated_from_the_committed_results():
    texts = [page.read_text() for page in report.PAGES]
    for name in report.SECTIONS:
        filled = f"<!-- {name} -->\n|"
        assert any(filled in text for text in texts), f"section {name} is empty: make report"
    for page, text in zip(report.PAGES, texts):
        assert report.render(text) == text, f"{page} is not what the results say: make report"


def test_every_figure_on_a_page_is_drawn_from_a_committed_result(tmp_path):
    shown = {
        name
        for page in report.PAGES
        for name in re.findall(r"figures/([\w-]+\.svg)", page.read_text())
    }
    drawn = set()
    for part in report.FIGURES:
        drawn |= {path.name for path in figures.draw_entries(part, merged(part), tmp_path)}
    assert shown == drawn
    assert all((report.DOCS / "figures" / name).exists() for name in shown), "make report"


def test_a_figure_is_the_same_bytes_every_time(tmp_path):
    one, two = (figures.draw(newest_path("equal"), tmp_path / n) for n in "ab")
    assert [a.read_bytes() for a in one] == [b.read_bytes() for b in two]


def test_a_miss_is_called_a_miss():
    from benchmarks.targets import Target

    assert not Target("", 0.8, 0.9).met and Target("", 0.8, 0.8).met
    assert "MISSED" in report._targets() and "met" in report._targets()


def test_the_api_page_is_what_the_package_says():
    assert api.PAGE.read_text() == api.document(), "run python -m benchmarks.api"


def test_the_study_page_is_made_of_its_committed_runs():
    assert study.PAGE.read_text() == study.document(newest("study")), "python -m benchmarks.study"
