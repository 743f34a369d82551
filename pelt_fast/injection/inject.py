"""inject and eject: put a method's sites into a transformers model, and take them out again."""

from typing import Any

import torch
from torch import nn

from pelt_fast.config import PeltConfig
from pelt_fast.config.word_values import flag
from pelt_fast.deprecated import renamed_keyword
from pelt_fast.layouts.layout import Layout, StackLayout
from pelt_fast.layouts.lookup import base_of, find
from pelt_fast.layouts.names import parameters_of, unwrapped
from pelt_fast.modules import ParallelFFNAdapter
from pelt_fast.modules.decision import DecidesOnce
from pelt_fast.modules.hooked import at_hand, holders
from pelt_fast.presets import method as preset
from pelt_fast.words import changed

from .build import BUILDERS
from .checks import check
from .described import described
from .disabled import refuse_disabled
from .folded_weights import unfold
from .generate import take_generate
from .handles import carrier_of, mark, refuse_second
from .own_configs import own_configs, return_configs
from .prompt_proof import prove_prompt
from .record import Injection, injection_of
from .repacking import keep_gradients
from .self_test import SelfTest
from .trained_names import bias_names, head_names
from .watch import check_free, watch


@renamed_keyword("slots", "layout")
def inject(
    model: nn.Module,
    method: str | PeltConfig,
    *,
    layout: Layout | None = None,
    pack: bool = True,
    **words: Any,
) -> nn.Module:
    """Put a method into a model, in place, and freeze the rest of the model.

    Afterwards the method trains and, unless its config says otherwise, the task head. The methods
    are those of the paper's Table 1 and section 4.6; ``explain`` shows what each site runs.

    Args:
        model: a transformers model; for a LoRA by name any ``nn.Module``. If it is a wrapper
            (torch.compile, DDP, PEFT), the model inside is changed.
        method: the name of a preset (:func:`pelt_fast.methods` has them), or a config.
        layout: where the model keeps its layers. None is the row of the table for its architecture;
            without a row it is discovered in a forward of a few tokens, and proved there.
        pack: whether a widened FFN moves the frozen weights into one buffer that has room for the
            adapter (docs/maths.md#i3). False leaves them in their own storage; FSDP2's
            ``fully_shard`` needs that.
        words: changes of the method, by the names that its builder gives them: ``r=8, alpha=16``,
            ``length=30``, ``dropout=0``, ``layers=range(8, 16)``, ``targets="all-linear"``. ``r``
            alone keeps alpha.

    Returns:
        ``model``.

    Raises:
        TypeError: ``method`` is no name and no config, ``model`` is not a transformers model, or
            ``pack`` or the value of a word has another type.
        ValueError: an unknown method, a word that does not apply to it, a model that already
            carries a method, a part that the method uses and that no row names and discovery does
            not find or prove, a module that the method cannot be put on, or an attention that
            cannot carry a prefix. The model is unchanged.

    Example:
        model = BartForConditionalGeneration.from_pretrained("facebook/bart-large")
        pelt_fast.inject(model, "mam")
        model(**batch).loss.backward()

        pelt_fast.inject(other, "lora", r=8, alpha=16, targets="q,k,v,o")
        pelt_fast.inject(third, pelt_fast.prefix(30) + pelt_fast.lora(r=8))
    """
    config = preset(method) if isinstance(method, str) else method
    if not isinstance(config, PeltConfig):
        raise TypeError(f"method must be a name or a PeltConfig, got {type(method).__name__}")
    config = changed(config, words)
    flag("pack", pack)
    handle, model = model, unwrapped(model)
    refuse_second(model)
    injection = Injection(config, pack)
    stacks = described(model, layout, injection)
    check(model, config, stacks)
    self_test = (
        None
        if injection.layout is None or not stacks
        else SelfTest(model, stacks, strict=injection.discovered)
    )
    try:
        _build(model, stacks, injection)
        for site in injection.sites:
            site.module.switch = injection.switch
        if self_test is not None:
            self_test.check(injection.sites)
        if injection.discovered:
            prove_prompt(model, injection.sites)
        for site in injection.sites:
            if isinstance(site.module, DecidesOnce):
                site.module.decision()
        watch(model, [find(base_of(model), stack.owner) for stack in stacks], injection)
    except BaseException:
        _restore(model, injection)
        raise
    model._pelt = injection
    return handle


def _build(model: nn.Module, stacks: list[StackLayout], injection: Injection) -> None:
    """Freeze the base and make every site."""
    base, config = base_of(model), injection.config
    mark(model, [base, *(find(base, stack.owner) for stack in stacks)], injection)
    if any(m.form == "prefix" or m.reads == "query" for m in config.modifications):
        own_configs(model, injection)
    keep_gradients(model, injection.changes)
    _freeze(model, stacks, injection)
    for form, build in BUILDERS.items():
        for modification in config.modifications:
            if modification.form == form:
                build(model, modification, stacks, injection)
    if injection.sites:
        take_generate(model, injection)


def _freeze(model: nn.Module, stacks: list[StackLayout], injection: Injection) -> None:
    """Freeze the base, and record the state from before."""
    config = injection.config
    if config.train_head and not config.is_full:
        injection.head = head_names(model)
    for modification in config.modifications:
        if modification.form == "bias":
            injection.biases = bias_names(model, modification, stacks)
    trained = injection.own_trained
    if not config.is_full:
        # not on a Sequential: it would run the new child
        holder = next(m for m in model.modules() if not isinstance(m, nn.Sequential))
        injection.changes.add(holder, "pelt_before", injection.before)
    with at_hand(holders(model, trained)):
        for name, parameter in parameters_of(model).items():
            injection.trainable_before[name] = parameter.requires_grad
            if name in trained:
                injection.before.trained[name] = parameter.detach().clone()
            parameter.requires_grad_(config.is_full or name in trained)


def eject(model: nn.Module) -> nn.Module:
    """Take the method out again: the model is the same as before inject, bit for bit.

    The task head has its weights from before, too. Hooks that accelerate added since are kept.

    Args:
        model: a model with a method, or a wrapper of one.

    Returns:
        ``model``.

    Raises:
        ValueError: nothing was injected; the method is full fine-tuning, which changed the base
            itself; or it was merged and no copy of the base was kept.
        RuntimeError: another library's wrapper keeps a site inside. The message says what to
            remove first.

    Example:
        pelt_fast.inject(model, "lora")
        pelt_fast.eject(model)
    """
    handle, model = model, carrier_of(model)
    injection = injection_of(model)
    refuse_disabled(injection, "eject")
    if injection.config.is_full:
        raise ValueError("full fine-tuning trains the base itself: there is nothing to eject")
    check_free(model, injection)
    with at_hand(holders(model, _changed_by_training(model, injection)), write=True):
        if injection.merged:
            unfold(injection)
        _restore(model, injection)
    del model._pelt
    return handle


def _changed_by_training(model: nn.Module, injection: Injection) -> set[str]:
    """Names of the model's own parameters whose values differ from those before."""
    before = injection.before.trained
    with at_hand(holders(model, before)):
        return {
            name
            for name, parameter in model.named_parameters()
            if name in before and not (parameter.is_meta or torch.equal(parameter, before[name]))
        }


def _restore(model: nn.Module, injection: Injection) -> None:
    """Undo every change, then restore the values of the model's parameters that trained."""
    for site in injection.sites:
        if isinstance(site.module, ParallelFFNAdapter):
            site.module.unpack()
    return_configs(injection)
    injection.changes.undo()
    parameters = parameters_of(model)
    for name, trainable in injection.trainable_before.items():
        if name in parameters:  # a module may have been replaced
            parameters[name].requires_grad_(trainable)
    with torch.no_grad():
        for name, value in injection.before.trained.items():
            parameter = parameters.get(name)
            if parameter is not None and not parameter.is_meta:  # on meta: offloaded, unchanged
                parameter.copy_(value)
                parameter.grad = None
