"""The kind of model that a task trains, and whether a model is of it, read from its config."""

from .registry import TASKS, Task

SEQ2SEQ, CAUSAL, ENCODER = "encoder-decoder", "causal language model", "encoder"
OTHER = "model of another kind"


def auto_class(task: Task):
    """transformers' auto class of a task's models."""
    import transformers

    if task.causal:
        return transformers.AutoModelForCausalLM
    if task.translates:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForSequenceClassification


def kind_of(config) -> str:
    """The kind of a model, from its config. An encoder that can be made a decoder is an encoder
    until its config says that it is one."""
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return SEQ2SEQ
    causal = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if causal and (not masked or getattr(config, "is_decoder", False)):
        return CAUSAL
    return ENCODER if masked else OTHER


def check_kind(config, task: Task, model: str) -> None:
    """ValueError, with a task that fits, when a model is of another kind than the task needs. A
    classification takes every model that transformers has a classifier for."""
    if not task.generates:
        return
    wanted, found = (CAUSAL if task.causal else SEQ2SEQ), kind_of(config)
    if found != wanted:
        fits = "" if found == OTHER else f": --task {fitting_task(found)} fits it"
        raise ValueError(
            f"task {task.name} trains {_a(wanted)}; {model} ({config.model_type}) is"
            f" {_a(found)}{fits}"
        )


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "ae" else f"a {kind}"


def fitting_task(kind: str) -> str:
    """The task of a user's own rows for a kind of model."""
    own = (task for task in TASKS.values() if task.hub is None)
    chosen = {CAUSAL: lambda t: t.causal, SEQ2SEQ: lambda t: t.translates}
    fits = chosen.get(kind, lambda task: not task.generates)
    return next(task.name for task in own if fits(task))
