"""The code in README.md and docs/ runs, page by page, and the links of the pages lead somewhere."""

import re

import pytest
import torch

from tests.docs.blocks import PAGES, ROOT, blocks_of, named

WITH_CODE = [page for page in PAGES if blocks_of(page.read_text())]
AN_EXTRA = "bitsandbytes is an extra (tests/models/test_quantised.py runs the page)"
# what no offline test can run: each is named here, so that nobody adds one unseen
NOT_RUN = {
    "docs/coming-from-adapters.md": ["adapters 1.x needs an older transformers"],
    "docs/line-counts.md": ["adapters 1.x needs an older transformers"] * 10,
    "docs/how-to/with-other-libraries.md": [AN_EXTRA],
    "docs/how-to/save-merge-share.md": ["it uploads to the hub"],
    "docs/how-to/quantised-bases.md": 3 * [AN_EXTRA],
}


@pytest.mark.parametrize("page", WITH_CODE, ids=named)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "__page__"}
    for block in blocks_of(page.read_text()):
        if block.reason is None:
            exec(block.compiled(page), namespace)


def test_the_blocks_that_do_not_run_are_these():
    found = {}
    for page in WITH_CODE:
        reasons = [block.reason for block in blocks_of(page.read_text()) if block.reason]
        if named(page) == "docs/api.md":
            reasons = [reason for reason in reasons if reason != "from a docstring"]
        if reasons:
            found[named(page)] = reasons
    assert found == NOT_RUN


@pytest.mark.parametrize("page", WITH_CODE, ids=named)
def test_every_block_is_python(page):
    for block in blocks_of(page.read_text()):
        if ">>>" not in block.code:
            block.compiled(page)


def anchors_of(text: str) -> set[str]:
    """What a link into a page may name: its headings as GitHub names them, and its own ids."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([\w-]+)">', text))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors_of(linked.read_text()), f"{target}: no such heading"


def test_every_page_is_reached_from_the_index():
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text())
        waiting += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert set(PAGES) <= seen


def test_the_code_cites_identities_that_the_maths_page_defines():
    anchors = anchors_of((ROOT / "docs" / "maths.md").read_text())
    for folder in ("pelt_fast", "kernels", "csrc", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cu", ".cpp", ".h", ".cuh"):
                cited = set(re.findall(r"docs/maths\.md#([\w-]+)", path.read_text()))
                assert cited <= anchors, f"{path} cites {cited - anchors}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_a_page_names_are_there(page):
    roots = r"(?:pelt_fast|kernels|csrc|benchmarks|tests|docs)"
    for path in re.findall(rf"(?<![\w/.])({roots}/[\w./-]*\w)(?![\w{{])", page.read_text()):
        path = path.partition("::")[0]
        assert (ROOT / path).exists() or path.endswith("_C_cuda.so"), f"{path}: no such file"
