"""What is released: an sdist that builds, with and without a compiler, and types for its users."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source archive, made of what git knows: not of what lies about."""
    folder = tmp_path_factory.mktemp("sdist")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("this is not a git checkout")
    for name in files.stdout.split():
        to = folder / "source" / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            to.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).is_file():
            to.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=folder / "source", check=True, capture_output=True)
    return next(folder.glob("*.tar.gz"))


def test_the_archive_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder, kinds in (("csrc", (".cpp", ".cu", ".cuh", ".h", ".py")), ("pelt_fast", (".py",))):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*")
                   if path.suffix in kinds and "__pycache__" not in path.parts}  # fmt: skip
        assert sources - names == set()
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pelt_fast/py.typed"} <= names


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_it_installs_and_runs(sdist, tmp_path, compiled, request):
    where = {**os.environ, "PELT_FAST_CPP": str(int(compiled)), "PYTHONPATH": str(tmp_path)}
    if request.config.getoption("--quick"):
        where["PELT_FAST_DEBUG"] = "1"  # not optimised, to compile sooner
    installed = subprocess.run(
        [*PIP, "--target", str(tmp_path), str(sdist)], env=where, capture_output=True, text=True
    )
    assert installed.returncode == 0, installed.stderr[-2000:]
    assert (tmp_path / "pelt_fast" / "py.typed").exists()
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "import torch, pelt_fast; from pelt_fast.ops.common import native; print(pelt_fast.__file__);"
        "print(native.why_missing());"
        "x = torch.randn(3, 8); w = torch.randn(4, 8); a = torch.randn(2, 8); b = torch.randn(4, 2);"
        "print(pelt_fast.functional.lora_linear(x, w, None, a, b, scale=1.0).shape)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=where, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    file, missing, shape = ran.stdout.splitlines()
    assert file.startswith(str(tmp_path)) and shape == "torch.Size([3, 4])"
    assert any((tmp_path / "pelt_fast").glob("_C.*")) == compiled
    assert missing == "None" if compiled else "installed without them" in missing
