"""The files around the code agree with it and with each other."""

import re
from pathlib import Path

import pytest
import yaml

import pelt_fast
from pelt_fast import deprecated

ROOT = Path(__file__).parents[1]
PINNED = {"ruff": ("pyproject.toml", "Makefile", ".pre-commit-config.yaml"),
          "mypy": ("pyproject.toml", "Makefile")}  # fmt: skip


def text(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize("tool", PINNED)
def test_a_tool_has_one_version(tool):
    versions = {name: set(re.findall(rf"{tool}==([\d.]+)", text(name))) for name in PINNED[tool]}
    assert len(set.union(*versions.values())) == 1 and all(versions.values()), versions


def test_the_changelog_names_every_alias():
    unreleased = text("CHANGELOG.md").partition("## [Unreleased]")[2]
    for old, new in deprecated.RENAMED.items():
        assert f"| `pelt_fast.{old}` | `pelt_fast.{new}` |" in unreleased


def test_the_changelog_is_as_keep_a_changelog_has_it():
    headings = re.findall(r"^## (.*)$", text("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert headings[1].startswith(f"[{pelt_fast.__version__}]")
    kinds = set(re.findall(r"^### (.*)$", text("CHANGELOG.md"), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == pelt_fast.__version__
    paper = citation["preferred-citation"]
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["He", "Zhou", "Ma", "Berg-Kirkpatrick", "Neubig"]


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load(text(".github/workflows/ci.yml"))
    commands = " ".join(
        step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]
    )
    for command in re.findall(r"^make \w+", text(".ci/run"), re.MULTILINE):
        assert command in commands
    torch = re.search(r"^TORCH\s+\?= (\S+)$", text("Makefile"), re.MULTILINE)[1]
    assert workflow["env"]["TORCH"].startswith(torch)


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.stem)
def test_a_form_is_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)
