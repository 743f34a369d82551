"""Says for each site of MODEL what runs fused, what fell back, and why.

The layout of an architecture without a row in the table is discovered on random weights, and
printed. Where it cannot be, a draft of one is printed.
"""

import argparse
import json

import torch

_MOST = 500_000_000  # parameters of a model that is built with random weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --method, --eval, --json."""
    parser.add_argument("model", metavar="MODEL", help="a local folder or a hub name")
    parser.add_argument("--method", default="mam", help="a preset (see pelt-fast methods)")
    parser.add_argument(
        "--eval", action="store_true", help="explain evaluation, not training, mode"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Build the model from its config without weights, inject, explain. For an architecture without
    a row of the table the weights are random; where no layout is found or proved on them, print why
    and a draft, and return 1."""
    from transformers import AutoConfig, AutoModel

    import pelt_fast
    from pelt_fast.layouts.discovery import draft
    from pelt_fast.layouts.table import rows_of
    from pelt_fast.presets import method
    from pelt_fast.tasks.pretrained import from_pretrained

    method(options.method)  # an unknown name is reported before anything is loaded
    config = from_pretrained(AutoConfig, options.model)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if not rows_of(model) and count > _MOST:
        print(f"# too large to run here ({count:,} parameters): inject finds the layout itself")
        print(draft(model))
        return 1
    has_row = bool(rows_of(model))
    model = model if has_row else AutoModel.from_config(config)
    try:
        pelt_fast.inject(model.train(not options.eval), options.method)
    except ValueError as error:
        if has_row:
            raise
        print(f"# {error}", draft(model), sep="\n")
        return 1
    explanation = pelt_fast.explain(model)
    print(json.dumps(explanation.as_dict(), indent=2) if options.json else explanation)
    return 0
