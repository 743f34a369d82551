"""Write the saved files of the ``pelt_fast`` on the path: ``python tests/saved/make.py``.

README.md says how to run it on the code of an earlier version.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parent))

import cases

import pelt_fast
from tests.small import inputs, randomise

try:
    from pelt_fast.integrations.trainer import save_trained
except ImportError:  # up to 0.1.0
    from pelt_fast.trainer import save_trained


def write(method: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = cases.base(method)
    pelt_fast.inject(model, pelt_fast.methods()[method].replace(**cases.SIZES))
    randomise(model).eval()
    pelt_fast.save(model, folder)
    if method in cases.TRAINED:
        save_trained(model, folder)
    names = cases.names(cases.base(method), model)
    (folder / cases.NAMES_FILE).write_text(json.dumps(names, indent=1) + "\n")
    batch = inputs(model, padding="right")
    batch.pop("labels")
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"].flip(1).contiguous()
    with torch.no_grad():
        logits = model(**batch).logits
    save_file({**batch, "logits": logits.contiguous()}, folder / cases.EXPECTED_FILE)


if __name__ == "__main__":
    print(pelt_fast.__version__, pelt_fast.__file__)
    for method in cases.CASES:
        write(method, cases.SAVED / pelt_fast.__version__ / method)
