"""The device, the backends that can run here, and why the others cannot."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import pelt_fast
from pelt_fast.ops.common import native
from pelt_fast.ops.common.backends import backends

PACKAGES = ("torch", "transformers", "triton", "datasets", "peft", "accelerate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def run(options: argparse.Namespace) -> int:
    """Print one fact a line."""
    print(f"pelt_fast     {pelt_fast.__version__}, Python {platform.python_version()}")
    for package in PACKAGES:
        print(f"{package:<13} {_version(package)}")
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    print(f"cpu           {capability}, {threads} threads")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"gpu           {gpu}")
    for name, missing in backends():
        print(f"backend       {name:<10} {'available' if missing is None else missing}")
    for name, fact in native.facts().items():
        print(f"C++ ops       {name}: {fact}")
    return 0
