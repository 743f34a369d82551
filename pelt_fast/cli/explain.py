"""Says for each site of MODEL what runs fused, what fell back, and why.

For an architecture without a row in the table it prints a draft of one.
"""

import argparse
import json

import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --method, --eval, --json."""
    parser.add_argument("model", metavar="MODEL", help="a local folder or a hub name")
    parser.add_argument("--method", default="mam", help="a preset (see pelt-fast methods)")
    parser.add_argument(
        "--eval", action="store_true", help="explain evaluation, not training, mode"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Build the model from its config without weights, inject, explain; for an architecture without
    a row of the table print a draft of one and return 1."""
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
    if not rows_of(model):
        print(draft(model))
        return 1
    pelt_fast.inject(model.train(not options.eval), options.method)
    explanation = pelt_fast.explain(model)
    print(json.dumps(explanation.as_dict(), indent=2) if options.json else explanation)
    return 0
