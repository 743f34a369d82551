"""Packages are listed by hand. ``pelt_fast/kernels`` is a
link to ``kernels/``, which has no ``__init__.py``: it would hide Hugging Face's package of that
name. The native half (csrc/) comes with its own issue: this version needs no compiler."""

from setuptools import setup

PACKAGES = [
    "pelt_fast",
    "pelt_fast.cli",
    "pelt_fast.fused",
    "pelt_fast.kernels",
    "pelt_fast.models",
    "pelt_fast.modules",
    "pelt_fast.ops",
    "pelt_fast.plans",
    "pelt_fast.reference",
    "pelt_fast.tasks",
]

setup(packages=PACKAGES)
