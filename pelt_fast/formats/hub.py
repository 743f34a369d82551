"""Methods on the Hugging Face hub: the method's files and a model card, through huggingface_hub."""

import tempfile
from collections import Counter
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from torch import nn

from pelt_fast.config import Modification
from pelt_fast.deprecated import renamed_keyword
from pelt_fast.injection.explain import explain
from pelt_fast.injection.handles import carrier_of
from pelt_fast.injection.record import injection_of
from pelt_fast.layouts.layout import Layout
from pelt_fast.layouts.lookup import base_of

from .checkpoint import CONFIG_FILE, WEIGHTS_FILE, load, save

CARD = "README.md"


def model_card(model: nn.Module, repo_id: str = "OWNER/NAME") -> str:
    """What an injected model carries, in the hub's form: base, method, sizes, how to use it."""
    model = carrier_of(model)
    config, explanation = injection_of(model).config, explain(model)
    base = base_of(model).config
    name, count = base._name_or_path or base.model_type, explanation.count
    places = Counter((site.op, site.name.rpartition(".")[2]) for site in explanation.sites)
    sites = [f"| {op} | {place} | {number} |" for (op, place), number in sorted(places.items())]
    known = [f"base_model: {base._name_or_path}"] if base._name_or_path else []
    front = ["---", "library_name: pelt_fast", *known, "tags:", "- parameter-efficient",
             f"- {config.name}", "---"]  # fmt: skip
    return "\n".join([
        *front, "", f"# {config.name} on {name}", "",
        "A parameter-efficient fine-tuning method and its weights; the base model is not in here.",
        "", *(f"- {_line(m)}" for m in config.modifications), "",
        f"{count.kept:,} numbers are kept, by the paper's count {count.percent:.2f} % of the base's"
        f" {count.base:,}.", "",
        "| op | place | sites |", "|---|---|---|", *sites, "",
        "```python", "import pelt_fast", f"from transformers import {type(model).__name__}", "",
        f'model = {type(model).__name__}.from_pretrained("{name}")',
        f'pelt_fast.load_from_hub(model, "{repo_id}")', "```", "",
    ])  # fmt: skip


def _line(m: Modification) -> str:
    scale = f", scale {m.scale}" if m.scale != 1 else ""
    layers = "" if m.layers is None else f", layers {', '.join(map(str, m.layers))}"
    return f"{m.insertion} {m.form} on {m.target}, {m.composition}, size {m.size}{scale}{layers}"


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str = "Upload a pelt_fast method",
    include_trained: bool | None = None,
    api: HfApi | None = None,
) -> str:
    """Upload the method of ``model`` and its card to ``repo_id``, made where it is not; returns the
    commit's URL.

    ``api`` is huggingface_hub's, with a token or endpoint of yours; ``include_trained`` as for
    :func:`pelt_fast.save`. Raises ValueError when nothing
    is injected, and huggingface_hub's own errors; nothing is uploaded unless all is written.
    """
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, include_trained=include_trained)
        (Path(folder) / CARD).write_text(model_card(model, repo_id))
        api = api or HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return done.commit_url


@renamed_keyword("slots", "layout")
def load_from_hub(
    model: nn.Module,
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    layout: Layout | None = None,
    pack: bool = True,
    head: bool = True,
) -> nn.Module:
    """:func:`pelt_fast.load` of what :func:`push_to_hub` put in ``repo_id``; only its two files are
    fetched, or found in the cache."""
    folder = snapshot_download(
        repo_id, revision=revision, token=token, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]
    )
    return load(model, folder, layout=layout, pack=pack, head=head)
