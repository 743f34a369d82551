"""Packages are listed by hand. The native halves (csrc/) come with their own issue: this version
is pure Python, and needs no compiler."""

from setuptools import setup

PACKAGES = [
    "pelt_fast",
    "pelt_fast.cli",
    "pelt_fast.models",
    "pelt_fast.modules",
    "pelt_fast.ops",
    "pelt_fast.plans",
    "pelt_fast.reference",
    "pelt_fast.tasks",
]

setup(packages=PACKAGES)
