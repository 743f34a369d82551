"""PEFT: its LoRA by default (fp32 factors), and with factors in the activation's dtype.

It has no adapters; its prefix tuning is concatenation.py's layer.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.problems import Absent, Problem, Provider
from benchmarks.whole import Trained, named
from pelt_fast.injection.targets import linears as targets
from pelt_fast.layouts.lookup import base_of, stacks_of

NAME = "PEFT"


def layer(problem: Problem) -> Iterator[Provider | Absent]:
    """The linear layers of a problem as PEFT wraps them, the problem's factors in them."""
    if not problem.subject.startswith("LoRA"):
        return
    try:
        import peft  # noqa: F401
    except ImportError as error:
        yield Absent(NAME, str(error))
        return
    yield linears(NAME, problem, torch.float32)
    if problem.dtype != torch.float32:
        yield linears(f"{NAME}, {_short(problem.dtype)} factors", problem, problem.dtype)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))


def linears(name: str, problem: Problem, dtype: torch.dtype) -> Provider:
    """PEFT's layers around the problem's weights, with the problem's factors in ``dtype``."""
    names = problem.options.get("names", ("",))
    model = _wrapped(problem, names, dtype)
    layers = [model.base_model.model[i] for i in range(len(names))]
    trained = {}
    for prefix, wrapped in zip(names, layers):
        for ours, theirs in (("lora_a", wrapped.lora_A), ("lora_b", wrapped.lora_B)):
            weight = theirs["default"].weight
            weight.data.copy_(problem.trained[f"{prefix}{ours}"].detach())
            trained[f"{prefix}{ours}"] = weight

    def call(x):
        found = tuple(wrapped(x) for wrapped in layers)
        return found[0] if len(found) == 1 else found

    return Provider(name, call, trained)


def _wrapped(problem: Problem, names, dtype: torch.dtype) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    linears = torch.nn.Sequential()
    for prefix in names:
        weight = problem.frozen[f"{prefix}weight"]
        bias = problem.frozen.get(f"{prefix}bias")
        linear = torch.nn.Linear(
            weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype
        )
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = torch.nn.Parameter(bias, requires_grad=False)
        linears.append(linear)
    settings = LoraConfig(
        r=problem.size, lora_alpha=problem.options["scale"] * problem.size,
        lora_dropout=problem.p, target_modules=[str(i) for i in range(len(names))],
    )  # fmt: skip
    model = get_peft_model(linears, settings, autocast_adapter_dtype=dtype == torch.float32)
    return model.train()


def model(base, config, injected) -> Iterator[Trained | Absent]:
    """PEFT's LoRA, prefix and prompt tuning of the same model; of adapters and mixtures it has
    none."""
    forms = {m.form for m in config.modifications}
    if forms not in ({"low_rank"}, {"prefix"}, {"prompt"}) or _is_ungated(config):
        return
    try:
        import peft
    except ImportError as error:
        yield Absent(NAME, str(error))
        return
    copied = copy.deepcopy(base)
    settings = _lora(copied, config) if forms == {"low_rank"} else _virtual(copied, config, forms)
    if isinstance(settings, str):
        yield Absent(NAME, settings)
        return
    wrapped = peft.get_peft_model(copied, settings)
    if forms == {"low_rank"}:
        yield Trained(NAME, wrapped, _factors(wrapped, injected), wrapped.save_pretrained)
    else:
        note = "its own tokens; decoder side alone"
        yield Trained(NAME, wrapped, None, wrapped.save_pretrained, note=note)


def _is_ungated(config) -> bool:
    return any(m.form == "prefix" and m.composition == "add" for m in config.modifications)


def _task(model: nn.Module) -> str:
    if model.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "SEQ_CLS" if hasattr(model, "classifier") else "CAUSAL_LM"


def _lora(model: nn.Module, config):
    from peft import LoraConfig

    first = config.modifications[0]
    same = {(m.size, m.scale, m.dropout) for m in config.modifications}
    if len(same) > 1:
        return "one rank, scale and dropout for all targets"
    base, stacks = base_of(model), stacks_of(model)
    names = [named(model, module) for m in config.modifications
             for _, module in targets(base, m, stacks)]  # fmt: skip
    return LoraConfig(
        r=first.size, lora_alpha=first.scale * first.size, lora_dropout=first.dropout,
        target_modules=names, task_type=_task(model),
    )  # fmt: skip


def _virtual(model: nn.Module, config, forms):
    from peft import PrefixTuningConfig, PromptTuningConfig

    (first,) = config.modifications
    common = dict(num_virtual_tokens=first.size, task_type=_task(model))
    if forms == {"prompt"}:
        return PromptTuningConfig(**common)
    mlp = first.reparameterization == "mlp"
    hidden = first.mlp_dim if mlp else None
    return PrefixTuningConfig(prefix_projection=mlp, encoder_hidden_size=hidden, **common)


def _factors(wrapped: nn.Module, injected: nn.Module) -> dict[str, torch.Tensor]:
    """PEFT's trainable tensors under our names, with our values."""
    values, found = dict(injected.named_parameters()), {}
    renamed = (
        (".lora_A.default.weight", ".pelt_lora.lora_a"),
        (".lora_B.default.weight", ".pelt_lora.lora_b"),
        (".modules_to_save.default", ""),
    )
    for name, parameter in wrapped.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.removeprefix("base_model.model.")
        for theirs, ours in renamed:
            name = name.replace(theirs, ours)
        parameter.data.copy_(values[name].detach())
        found[name] = parameter
    return found
