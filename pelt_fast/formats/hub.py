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
from pelt_fast.injection.record import injection_of, refuse_together
from pelt_fast.layouts.layout import Layout
from pelt_fast.layouts.names import check_model

from .checkpoint import CONFIG_FILE, WEIGHTS_FILE, load, save
from .fingerprint import identity

CARD = "README.md"


def model_card(model: nn.Module, repo_id: str = "OWNER/NAME") -> str:
    """The card of an injected model: its base, its method, the sizes, and how to use it."""
    model = carrier_of(model)
    refuse_together(injection_of(model), "push_to_hub")
    config, explanation = injection_of(model).config, explain(model)
    architecture, known_as = identity(model)
    name, count = known_as or architecture, explanation.count
    counts = Counter((site.op, site.name.rpartition(".")[2]) for site in explanation.sites)
    sites = [f"| {op} | {module} | {number} |" for (op, module), number in sorted(counts.items())]
    known = [f"base_model: {known_as}"] if known_as else []
    front = ["---", "library_name: pelt_fast", *known, "tags:", "- parameter-efficient",
             f"- {config.name}", "---"]  # fmt: skip
    return "\n".join([
        *front, "", f"# {config.name} on {name}", "",
        "A parameter-efficient fine-tuning method and its weights; the base model is not in here.",
        "", *(f"- {_line(m)}" for m in config.modifications), "",
        f"{count.kept:,} numbers are kept, by the paper's count {count.percent:.2f} % of the base's"
        f" {count.base:,}.", "",
        "| op | module | sites |", "|---|---|---|", *sites, "",
        "```python", "import pelt_fast", f"from transformers import {type(model).__name__}", "",
        f'model = {type(model).__name__}.from_pretrained("{name}")',
        f'pelt_fast.load_from_hub(model, "{repo_id}")', "```", "",
    ])  # fmt: skip


def _line(m: Modification) -> str:
    scale = f", scale {m.scale}" if m.scale != 1 else ""
    layers = "" if m.layers is None else f", layers {', '.join(map(str, m.layers))}"
    named = "" if m.modules is None else f" {m.modules}"
    what = f"{m.insertion} {m.form} on {m.target}{named}"
    return f"{what}, {m.composition}, size {m.size}{scale}{layers}"


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str = "Upload a pelt_fast method",
    include_trained: bool | None = None,
    api: HfApi | None = None,
) -> str:
    """Upload the method of a model, with a model card, to the Hugging Face hub.

    Args:
        model: a model with a method, or a wrapper of one.
        repo_id: "OWNER/NAME"; the repository is made when it does not exist.
        private: whether a new repository is private; None is the account's default.
        commit_message: of the upload.
        include_trained: as for :func:`pelt_fast.save`.
        api: huggingface_hub's client, where another token or endpoint is wanted.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: nothing is injected, or the method is merged. Nothing is uploaded.
        huggingface_hub.errors.HfHubHTTPError: the hub refuses.

    Saved:
        What :func:`pelt_fast.save` writes, and ``README.md``.

    Example:
        pelt_fast.push_to_hub(model, "me/bart-xsum-mam")
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
    """Load a method from the Hugging Face hub, as :func:`pelt_fast.load` does from a folder.

    Only the method's two files are fetched, or taken from the cache.

    Args:
        model: a model of the base that the method belongs to, without a method.
        repo_id: "OWNER/NAME".
        revision: a branch, tag or commit; None is the main branch.
        token: for a private repository; True reads the one that is stored on this machine.
        layout: as for :func:`pelt_fast.inject`.
        pack: as for :func:`pelt_fast.inject`.
        head: as for :func:`pelt_fast.load`.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: the repository holds no saved method.
        ValueError: as for :func:`pelt_fast.load`. The model is unchanged.
        huggingface_hub.errors.HfHubHTTPError: the hub refuses, or there is no such repository.

    Example:
        pelt_fast.load_from_hub(model, "me/bart-xsum-mam")
    """
    check_model(model)
    folder = snapshot_download(
        repo_id, revision=revision, token=token, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]
    )
    return load(model, folder, layout=layout, pack=pack, head=head)
