"""Write a saved method in the format of PEFT or of AdapterHub."""

import argparse
from pathlib import Path

from pelt_fast.cli.arguments import add_saved, refuse_full


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The method, its base, the format, and where the files go."""
    add_saved(parser)
    parser.add_argument("--to", choices=("peft", "adapterhub"), required=True, help="the format")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="a new folder")
    parser.add_argument("--name", default="pelt_fast", help="the adapter's name, of AdapterHub")


def run(options: argparse.Namespace) -> int:
    """Load and write. A method that the format cannot hold is refused with the reason."""
    import pelt_fast
    from pelt_fast.tasks.saved import load_saved

    refuse_full(options.output)
    model, _ = load_saved(options.folder, options.model)
    if options.to == "peft":
        pelt_fast.export_peft(model, options.output)
        reader = "peft.PeftModel.from_pretrained(model, folder)"
    else:
        pelt_fast.export_adapterhub(model, options.output, name=options.name)
        reader = "model.load_adapter(folder) of adapters"
    print(f"{options.output}: {reader} reads it")
    return 0
