"""README's tables are what the committed results say; the benchmarks print theirs."""

import subprocess
import sys

from benchmarks import report


def test_readme_is_generated_from_the_committed_results():
    texts = [page.read_text() for page in report.PAGES]
    for name in report.SECTIONS:
        filled = f"<!-- {name} -->\n|"
        assert any(filled in text for text in texts), f"section {name} is empty: make readme"
    for page, text in zip(report.PAGES, texts):
        assert report.render(text) == text, f"{page} is not what the results say: make readme"


def test_lora_benchmark_prints_ours_the_floor_and_the_peer():
    command = [sys.executable, "-m", "benchmarks.lora_linear", "--repeats", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=report.REPOSITORY)
    assert ran.returncode == 0, ran.stderr
    for name in ("frozen linear", "pelt_fast", "PEFT"):
        assert ran.stdout.count(f"| {name} ") == 2


def test_predictions_page_is_what_the_command_writes():
    from benchmarks.gpu import predict

    assert predict.PAGE.read_text() == predict.page()
    assert all(1 < p.ratio < 2 for p in predict.predictions())
