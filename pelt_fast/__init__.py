"""pelt_fast: parameter-efficient fine-tuning at the cost of the frozen model.

Each name is imported when it is first used, so that ``import pelt_fast`` needs torch alone.
"""

import importlib
import os
from typing import TYPE_CHECKING

from pelt_fast import deprecated
from pelt_fast._version import __version__

if TYPE_CHECKING:
    from pelt_fast import functional
    from pelt_fast.builders import (
        adapter,
        bitfit,
        lora,
        multi_head_adapter,
        parallel_adapter,
        prefix,
        prompt,
    )
    from pelt_fast.compose.merge import merge, unmerge
    from pelt_fast.compose.method_store import MethodStore
    from pelt_fast.compose.named_methods import active, inject_named, set_active
    from pelt_fast.compose.route import route
    from pelt_fast.compose.together import add_method, drop_method
    from pelt_fast.config import Modification, PeltConfig
    from pelt_fast.formats.adapterhub_reader import load_adapterhub
    from pelt_fast.formats.adapterhub_writer import export_adapterhub
    from pelt_fast.formats.checkpoint import load, save
    from pelt_fast.formats.hub import load_from_hub, push_to_hub
    from pelt_fast.formats.peft_reader import load_peft
    from pelt_fast.formats.peft_writer import export_peft
    from pelt_fast.injection.count import count_parameters
    from pelt_fast.injection.disabled import disabled
    from pelt_fast.injection.explain import explain
    from pelt_fast.injection.inject import eject, inject
    from pelt_fast.injection.reference_model import reference_model
    from pelt_fast.integrations.accelerate_peft import accelerate_peft, restore_peft
    from pelt_fast.integrations.several.runs import MethodRun
    from pelt_fast.integrations.several.train import train_several
    from pelt_fast.layouts.layout import (
        AttentionLayout,
        FFNLayout,
        Layout,
        PromptLayout,
        StackLayout,
    )
    from pelt_fast.ops.common.backends import backend
    from pelt_fast.presets import methods

# where each public name is defined
_HOMES = {
    "builders": (
        "adapter",
        "bitfit",
        "lora",
        "multi_head_adapter",
        "parallel_adapter",
        "prefix",
        "prompt",
    ),
    "compose.merge": ("merge", "unmerge"),
    "compose.method_store": ("MethodStore",),
    "compose.named_methods": ("active", "inject_named", "set_active"),
    "compose.route": ("route",),
    "compose.together": ("add_method", "drop_method"),
    "config": ("Modification", "PeltConfig"),
    "formats.adapterhub_reader": ("load_adapterhub",),
    "formats.adapterhub_writer": ("export_adapterhub",),
    "formats.checkpoint": ("load", "save"),
    "formats.hub": ("load_from_hub", "push_to_hub"),
    "formats.peft_reader": ("load_peft",),
    "formats.peft_writer": ("export_peft",),
    "injection.count": ("count_parameters",),
    "injection.disabled": ("disabled",),
    "injection.explain": ("explain",),
    "injection.inject": ("eject", "inject"),
    "injection.reference_model": ("reference_model",),
    "integrations.accelerate_peft": ("accelerate_peft", "restore_peft"),
    "integrations.several.runs": ("MethodRun",),
    "integrations.several.train": ("train_several",),
    "layouts.layout": (
        "AttentionLayout",
        "FFNLayout",
        "Layout",
        "PromptLayout",
        "StackLayout",
    ),
    "presets": ("methods",),
    "ops.common.backends": ("backend",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AttentionLayout",
    "FFNLayout",
    "Layout",
    "MethodRun",
    "MethodStore",
    "Modification",
    "PeltConfig",
    "PromptLayout",
    "StackLayout",
    "__version__",
    "accelerate_peft",
    "active",
    "adapter",
    "add_method",
    "backend",
    "bitfit",
    "count_parameters",
    "disabled",
    "drop_method",
    "eject",
    "explain",
    "export_adapterhub",
    "export_peft",
    "functional",
    "inject",
    "inject_named",
    "load",
    "load_adapterhub",
    "load_from_hub",
    "load_peft",
    "lora",
    "merge",
    "methods",
    "multi_head_adapter",
    "parallel_adapter",
    "prefix",
    "prompt",
    "push_to_hub",
    "reference_model",
    "restore_peft",
    "route",
    "save",
    "set_active",
    "train_several",
    "unmerge",
]


def __getattr__(name: str):
    if name == "functional":
        return importlib.import_module("pelt_fast.functional")
    if name in deprecated.RENAMED:
        new = deprecated.RENAMED[name]
        deprecated.warn(f"pelt_fast.{name}", f"pelt_fast.{new}")
        return getattr(importlib.import_module("pelt_fast"), new)
    if name not in _HOME:
        raise AttributeError(f"module 'pelt_fast' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"pelt_fast.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__


def _check_environment() -> None:
    """Check the backend of the environment variable at once, not when the first op runs."""
    if os.environ.get("PELT_FAST_BACKEND", "auto") != "auto":
        importlib.import_module(f"pelt_fast.{_HOME['backend']}")


_check_environment()
