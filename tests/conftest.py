"""Shared fixtures: quiet libraries, one seed, small real architectures."""

import getpass
import importlib.util
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# inductor's cache holds C++ that was written for one vector length, and does not ask for which
if cap := os.environ.get("ATEN_CPU_CAPABILITY"):
    folder = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{cap}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)

import torch

# before any kernel is imported: without a GPU they are interpreted
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import transformers

from tests import interpreter, quick

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    interpreter.patch_once()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()  # a message is to be the only line


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="what make test runs (tests/quick.py)")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        quick.select(config, items)


def pytest_configure(config):
    config.addinivalue_line("markers", quick.MARK)
    if config.getoption("--quick"):
        os.environ.setdefault("PELT_FAST_FUZZ", "60")  # drawn arguments a test (test_fuzz)
    # pytest-xdist runs a process a core: more threads would only fight
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that a test starts
