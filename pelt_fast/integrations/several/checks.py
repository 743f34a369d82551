"""What train_several refuses, before anything changes."""

import math
import os
from collections.abc import Mapping, Sized
from numbers import Integral, Real
from pathlib import Path

from torch import nn

from pelt_fast.injection.disabled import refuse_disabled
from pelt_fast.injection.inject_together import TogetherInjection
from pelt_fast.injection.method_names import parameters_of_method
from pelt_fast.layouts.names import is_method, parameters_of

from .runs import MethodRun
from .schedules import SCHEDULES, factor

# arguments of a Trainer that each method has its own of, and the field of MethodRun
OF_A_RUN = {
    "learning_rate": "learning_rate", "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup_steps", "warmup_ratio": "warmup_steps",
    "max_steps": "steps", "num_train_epochs": "steps",
    "per_device_train_batch_size": "batch_size", "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm", "data_seed": "seed",
}  # fmt: skip
# arguments that have no meaning here, the value that is no request, and what to do instead
REFUSED = {
    "gradient_accumulation_steps": (1, "a step is one batch: give MethodRun(batch_size=...)"),
    "fp16": (False, "one loss scale would be shared by all methods: use bf16=True"),
    "label_smoothing_factor": (0.0, "the loss is the model's own"),
    "lr_scheduler_kwargs": (None, "MethodRun(schedule=...) has no settings"),
    "eval_strategy": ("no", "evaluate each method afterwards, under route"),
    "do_eval": (False, "evaluate each method afterwards, under route"),
    "load_best_model_at_end": (False, "each method is saved when it ends"),
    "auto_find_batch_size": (False, "give MethodRun(batch_size=...)"),
    "fsdp": (None, "one process trains all methods"),
    "deepspeed": (None, "one process trains all methods"),
}
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def check_arguments(given: dict) -> None:
    """ValueError for an argument that a method has its own of, or that has no meaning."""
    for name, field in OF_A_RUN.items():
        if name in given:
            raise ValueError(
                f"{name}={given[name]!r}: each method has its own: give MethodRun({field}=...)"
            )
    for name, (none, instead) in REFUSED.items():
        if given.get(name) not in (none, None, "", [], {}):
            raise ValueError(f"{name}={given[name]!r} is not for several methods: {instead}")
    optim = given.get("optim", OPTIMIZERS[0])
    if getattr(optim, "value", optim) not in OPTIMIZERS:
        raise ValueError(f"optim must be one of {', '.join(OPTIMIZERS)}, got {optim!r}")


def check_runs(model: nn.Module, injection: TogetherInjection, runs: Mapping) -> None:
    """ValueError or TypeError for runs that cannot be trained."""
    refuse_disabled(injection, "train_several")
    if not isinstance(runs, Mapping):
        raise TypeError(f"runs must be a dict of MethodRun by name, got {type(runs).__name__}")
    if not runs:
        raise ValueError("runs must have a MethodRun for at least one method, got none")
    for name, run in runs.items():
        injection.known(name)
        _check_run(f"runs[{name!r}]", run)
        if not any(p.requires_grad for p in parameters_of_method(model, name).values()):
            raise ValueError(f"runs[{name!r}]: no parameter of the method trains")
    _check_folders(runs)
    _check_unfrozen(model)


def _check_run(where: str, run: MethodRun) -> None:
    if not isinstance(run, MethodRun):
        raise TypeError(f"{where} must be a MethodRun, got {type(run).__name__}")
    if not isinstance(run.dataset, Sized) or not hasattr(run.dataset, "__getitem__"):
        kind = type(run.dataset).__name__
        raise TypeError(f"{where}: dataset must have a length and an index, got {kind}")
    if not len(run.dataset):
        raise ValueError(f"{where}: dataset must have at least one row, got none")
    for name in ("steps", "batch_size"):
        _check_whole(where, name, getattr(run, name), 1)
    _check_whole(where, "warmup_steps", run.warmup_steps, 0)
    _check_whole(where, "seed", run.seed, None)
    for name in ("learning_rate", "weight_decay", "max_grad_norm"):
        _check_number(where, name, getattr(run, name))
    if run.stop_above is not None:
        _check_number(where, "stop_above", run.stop_above)
    if run.folder is not None and not isinstance(run.folder, (str, os.PathLike)):
        raise TypeError(f"{where}: folder must be a path, got {type(run.folder).__name__}")
    _check_schedule(where, run)


def _check_whole(where: str, name: str, value, least: int | None) -> None:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or (least is not None and value < least):
        at_least = "" if least is None else f" >= {least}"
        raise ValueError(f"{where}: {name} must be a whole number{at_least}, got {value!r}")


def _check_number(where: str, name: str, value) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{where}: {name} must be a finite number >= 0, got {value!r}")


def _check_schedule(where: str, run: MethodRun) -> None:
    if run.schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ValueError(f"{where}: schedule must be one of {known}; got {run.schedule!r}")
    if run.schedule == "constant" and run.warmup_steps:
        raise ValueError(
            f"{where}: schedule 'constant' has no warmup, got warmup_steps={run.warmup_steps}: use"
            " 'constant_with_warmup'"
        )
    try:
        factor(run)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{where}: schedule {run.schedule!r} does not take"
            f" learning_rate={run.learning_rate!r}: {error}"
        ) from None


def _check_folders(runs: Mapping[str, MethodRun]) -> None:
    used: dict[Path, str] = {}
    for name, run in runs.items():
        if run.folder is None:
            continue
        folder = Path(run.folder).resolve()
        if folder in used:
            raise ValueError(
                f"runs[{name!r}]: folder must be the run's own, got {str(run.folder)!r}, which"
                f" runs[{used[folder]!r}] has as well"
            )
        used[folder] = name


def _check_unfrozen(model: nn.Module) -> None:
    for name, parameter in parameters_of(model).items():
        if parameter.requires_grad and not is_method(name):
            raise ValueError(
                f"{name} trains and is no method's: with several methods the base is frozen"
            )
