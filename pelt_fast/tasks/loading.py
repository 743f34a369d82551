"""Model and tokenizer of a recipe. What can be refused is refused from the config, before weights
are read."""

import importlib.util

from torch import nn

from .kinds import auto_class, check_kind
from .pretrained import from_pretrained
from .quantise import quantisation
from .recipe import Recipe
from .registry import Task, task_of
from .say import say


def check_here(recipe: Recipe) -> None:
    """What needs neither model nor rows. Raises ValueError for a recipe without a model or with a
    setting that its task does not have, RuntimeError where a library that it needs is missing."""
    if not recipe.model:
        raise ValueError("model is missing: a recipe names one, or --model a folder or hub name")
    task = task_of(recipe.task)
    if task.causal and importlib.util.find_spec("trl") is None:
        raise RuntimeError(
            f"task {recipe.task} needs the extra: pip install 'pelt_fast[instruct]' (no trl)"
        )
    if recipe.quantize and not task.causal:
        raise ValueError(f"quantize is for causal language models, not for task {recipe.task}")
    if recipe.batch_tokens and task.causal:
        raise ValueError(
            f"batch_tokens={recipe.batch_tokens} is not for task {recipe.task}: give batch_size, in"
            " rows of max_length tokens"
        )
    if recipe.select_by not in task.selects:
        raise ValueError(
            f"select_by of task {recipe.task} must be one of {', '.join(task.selects)};"
            f" got {recipe.select_by!r}"
        )
    quantisation(recipe)


def load_config(recipe: Recipe):
    """The model's config. Raises OSError when it cannot be loaded, ValueError when it is of another
    kind than the task needs."""
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, recipe.model, **recipe.model_config)
    check_kind(config, task_of(recipe.task), recipe.model)
    return config


def load_tokenizer(recipe: Recipe, config=None):
    """The tokenizer of a recipe's model, able to pad. ``config`` is the model's; None loads it.
    Raises OSError when it cannot be loaded, ValueError when it cannot pad, or the model is of
    another kind or has too few positions."""
    from transformers import AutoTokenizer

    config, task = config or load_config(recipe), task_of(recipe.task)
    tokenizer = from_pretrained(AutoTokenizer, recipe.model)
    if tokenizer.pad_token is None:
        _give_padding(tokenizer, task, recipe.model)
    _check_length(config, tokenizer, recipe)
    _set_languages(tokenizer, task)
    return tokenizer


def _give_padding(tokenizer, task: Task, model: str) -> None:
    """A causal model never reads what it pads with: its end token serves. Others need their own."""
    if not task.causal or tokenizer.eos_token is None:
        missing = "no pad token" if not task.causal else "neither a pad nor an end token"
        raise ValueError(
            f"the tokenizer of {model} has {missing}: set one, tokenizer.pad_token = ..."
        )
    tokenizer.pad_token = tokenizer.eos_token
    say(f"the tokenizer of {model} has no pad token: its end token {tokenizer.eos_token!r} pads")


def load_model(recipe: Recipe, classes: tuple[str, ...] = ()):
    """Model and tokenizer of a recipe. Raises what :func:`check_here` and :func:`load_tokenizer`
    raise, and OSError when the model cannot be loaded."""
    check_here(recipe)
    tokenizer = load_tokenizer(recipe)
    return load_weights(recipe, tokenizer, classes), tokenizer


def load_weights(recipe: Recipe, tokenizer, classes: tuple[str, ...] = ()) -> nn.Module:
    """The model of a recipe, for a tokenizer of :func:`load_tokenizer`."""
    task, options = task_of(recipe.task), {**recipe.model_config, **quantisation(recipe)}
    if classes:
        options |= dict(num_labels=len(classes), id2label=dict(enumerate(classes)),
                        label2id={name: i for i, name in enumerate(classes)},
                        ignore_mismatched_sizes=True)  # fmt: skip
    model = from_pretrained(auto_class(task), recipe.model, **options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if task.generates:
        prepare_generation(model, tokenizer, task, recipe)
    return model


# families whose positions begin after the padding index
_AFTER_PADDING = (
    "camembert", "data2vec-text", "ibert", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


def positions_of(config, tokenizer) -> int | None:
    """The tokens that a model has positions for; None without a limit."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")  # MPT has the second
    positions = next((n for name in names if (n := getattr(text, name, None)) is not None), None)
    if positions is None or config.model_type not in _AFTER_PADDING:
        return positions
    padding = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
    return positions - padding - 1


def _check_length(config, tokenizer, recipe: Recipe) -> None:
    """ValueError for rows, targets or answers that are longer than the model has positions for."""
    positions = positions_of(config, tokenizer)
    if positions is None:
        return
    names = ("max_length", "max_target", "max_generated")
    for name in names if task_of(recipe.task).translates else names[:1]:
        if getattr(recipe, name) > positions:
            raise ValueError(
                f"{name}={getattr(recipe, name)} is longer than the {positions} positions of"
                f" {recipe.model}"
            )


def _set_languages(tokenizer, task: Task) -> bool:
    """Tell a multilingual tokenizer the task's languages; False for any other."""
    if not task.codes or not hasattr(tokenizer, "lang_code_to_id"):
        return False
    tokenizer.src_lang, tokenizer.tgt_lang = task.codes
    return True


def prepare_generation(model: nn.Module, tokenizer, task: Task, recipe: Recipe) -> None:
    """Write the recipe's generation settings to the model's config."""
    config = model.generation_config
    if _set_languages(tokenizer, task):
        start = tokenizer.convert_tokens_to_ids(task.codes[1])
        model.config.decoder_start_token_id = config.decoder_start_token_id = start
    config.num_beams, config.no_repeat_ngram_size = recipe.beams, recipe.no_repeat_ngram
    config.max_new_tokens, config.max_length = recipe.max_generated, None
    config.min_new_tokens, config.min_length = recipe.min_generated or None, None
    config.early_stopping = recipe.beams > 1
