"""A base with a saved method in it, from the method's folder and the base's."""

from pathlib import Path

from torch import nn

import pelt_fast
from pelt_fast.formats.checkpoint import read_config

from .kinds import CAUSAL, SEQ2SEQ, kind_of
from .pretrained import from_pretrained


def load_saved(folder: Path, path: str | None = None) -> tuple[nn.Module, str]:
    """The base with the method of ``folder`` in it, in evaluation mode, and where the base is.

    ``path`` is the base's folder or hub name; None takes the name that the method was saved with.
    The model is of the class that the method was trained on. A file without that class is of a
    version before it was written: then it is a language model of its kind.

    Raises FileNotFoundError when there is no method, OSError when the base cannot be loaded, and
    ValueError when it is another base.
    """
    _, description = read_config(folder)
    base = description["base"]
    path = path or base["name"]
    if not path:
        raise ValueError(f"{folder} does not say which base it belongs to: give --model PATH")
    labels = base.get("labels")
    options = {}
    if labels:
        options = dict(num_labels=len(labels), id2label=dict(enumerate(labels)),
                       label2id={name: i for i, name in enumerate(labels)},
                       ignore_mismatched_sizes=True)  # fmt: skip
    model = from_pretrained(_class_of(base.get("class"), path), path, **options)
    return pelt_fast.load(model, folder).eval(), path


def _class_of(name: str | None, path: str):
    """The class of transformers that a base is loaded as."""
    import transformers

    if name is not None:
        found = getattr(transformers, name, None)
        if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
            raise ValueError(f"this transformers has no model class {name!r}")
        return found
    config = from_pretrained(transformers.AutoConfig, path)
    kinds = {SEQ2SEQ: transformers.AutoModelForSeq2SeqLM, CAUSAL: transformers.AutoModelForCausalLM}
    kind = kind_of(config)
    if kind not in kinds:
        raise ValueError(f"the saved method does not say which head it has on {path}: save it anew")
    return kinds[kind]


def load_tokenizer_of(path: str):
    """The base's tokenizer. Raises OSError when it has none."""
    from transformers import AutoTokenizer

    return from_pretrained(AutoTokenizer, path)
