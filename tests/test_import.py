"""The package imports without its optional companions, and quickly says what it lacks."""

import subprocess
import sys

WITHOUT = """
import sys
for name in ("triton", "datasets", "peft", "accelerate", "matplotlib"):
    sys.modules[name] = None  # not importable, and find_spec gives None
import pelt_fast
from tests.small import roberta, inputs
model = pelt_fast.inject(roberta(), pelt_fast.methods()["mam_glue"])
model(**inputs(model)).loss.backward()
from pelt_fast.cli import main
assert main(["info"]) == 0
assert main(["train", "--data", ".", "--model", "x"]) == 2
"""


def test_import_works_without_triton_datasets_and_peft(tmp_path):
    ran = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "is missing" in ran.stderr or "holds none of" in ran.stderr or "extra" in ran.stderr


def test_nothing_optional_is_imported_up_front():
    names = {}
    for module in ("transformers.modeling_utils", "pelt_fast"):
        code = f"import sys, {module}; print(*sys.modules)"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        names[module] = {name.split(".")[0] for name in ran.stdout.split()}
    ours = names["pelt_fast"] - names["transformers.modeling_utils"]
    assert not ours & {"datasets", "peft", "matplotlib", "accelerate", "triton", "sklearn"}
