"""pelt_fast.testing is light: only its models need transformers."""

import subprocess
import sys

CODE = """
import sys
from pelt_fast import testing
assert len(list(testing.cases())) > 20
assert "transformers" not in sys.modules
from pelt_fast.testing import models
assert "transformers" in sys.modules and set(models.MODELS) >= {"bart", "llama"}
"""


def test_cases_need_torch_alone_and_models_need_transformers():
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
