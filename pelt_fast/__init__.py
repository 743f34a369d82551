"""pelt_fast: parameter-efficient fine-tuning at the cost of the frozen model."""

from pelt_fast import functional
from pelt_fast._version import __version__
from pelt_fast.config import Modification, PeltConfig
from pelt_fast.hub import load_from_hub, push_to_hub
from pelt_fast.methods import methods
from pelt_fast.models.adapterhub import load_adapterhub
from pelt_fast.models.adapterhub_export import export_adapterhub
from pelt_fast.models.checkpoint import load, save
from pelt_fast.models.count import count_parameters
from pelt_fast.models.explain import explain
from pelt_fast.models.inject import eject, inject
from pelt_fast.models.merge import merge, unmerge
from pelt_fast.models.peft import accelerate_peft, restore_peft
from pelt_fast.models.peft_export import export_peft
from pelt_fast.models.peft_files import load_peft
from pelt_fast.models.several import activate, active, inject_several
from pelt_fast.models.slots import (
    AttentionSlot,
    FFNSlot,
    PromptSlot,
    SlotMap,
    StackSlot,
)  # fmt: skip
from pelt_fast.ops.backends import backend

__all__ = [
    "AttentionSlot",
    "FFNSlot",
    "Modification",
    "PeltConfig",
    "PromptSlot",
    "SlotMap",
    "StackSlot",
    "__version__",
    "accelerate_peft",
    "activate",
    "active",
    "backend",
    "count_parameters",
    "eject",
    "explain",
    "export_adapterhub",
    "export_peft",
    "functional",
    "inject",
    "inject_several",
    "load",
    "load_adapterhub",
    "load_from_hub",
    "load_peft",
    "merge",
    "methods",
    "push_to_hub",
    "restore_peft",
    "save",
    "unmerge",
]
