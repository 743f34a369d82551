"""Says for each site of MODEL what runs fused, what fell back, and why.

The layout of an architecture without a row in the table is discovered on random weights, and
printed. Where it cannot be, a draft of one is printed.
"""

import argparse
import json

import torch

from pelt_fast.cli.arguments import add_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --method, --set, --eval, --json."""
    parser.add_argument("model", metavar="MODEL", help="a local folder or a hub name")
    parser.add_argument("--method", default="mam", help="a preset (see pelt-fast methods)")
    add_words(parser)
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
    from pelt_fast.presets import method
    from pelt_fast.tasks.found_layout import MOST, needs_discovery
    from pelt_fast.tasks.pretrained import from_pretrained
    from pelt_fast.tasks.say import unsaid
    from pelt_fast.words import changed, parsed

    # what is wrong with the method is said before anything is loaded
    chosen = changed(method(options.method), parsed(options.words))
    config = from_pretrained(AutoConfig, options.model)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    discovers = needs_discovery(model, chosen)
    if discovers and count > MOST:
        print(f"# too large to run here ({count:,} parameters): inject finds the layout itself")
        print(draft(model))
        return 1
    model = AutoModel.from_config(config) if discovers else model
    try:
        with unsaid("self_test"):  # which cannot run on the meta device
            pelt_fast.inject(model.train(not options.eval), chosen)
    except ValueError as error:
        if not discovers:
            raise
        print(f"# {error}", draft(model), sep="\n")
        return 1
    explanation = pelt_fast.explain(model)
    print(json.dumps(explanation.as_dict(), indent=2) if options.json else explanation)
    return 0
