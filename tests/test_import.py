"""The package imports without its optional companions, and quickly says what it lacks."""

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

import pelt_fast

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


LIBRARIES = {"transformers", "safetensors", "huggingface_hub", "numpy", "peft", "accelerate"}
MODEL_ROOMS = ("modules", "layouts", "injection", "compose", "formats", "integrations", "tasks")


def imported(code: str) -> set[str]:
    """The modules that ``code`` imports in a process of its own, beside those of torch alone."""
    code = f"import sys, torch; torch_alone = set(sys.modules); {code}"
    code += "; print(*(set(sys.modules) - torch_alone), file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stderr.split())


def rooms(names: set[str]) -> set[str]:
    """The packages and files directly in pelt_fast, of these modules."""
    return {name.split(".")[1] for name in names if name.startswith("pelt_fast.")}


def test_the_package_imports_nothing_until_a_name_is_used():
    names = imported("import pelt_fast")
    assert names == {"pelt_fast", "pelt_fast._version", "pelt_fast.deprecated"}


def test_the_functions_need_torch_alone():
    names = imported("import pelt_fast.functional; pelt_fast.functional.lora_linear")
    assert {name.split(".")[0] for name in names} == {"pelt_fast"}
    assert not rooms(names) & set(MODEL_ROOMS)


@pytest.mark.parametrize("name", ["PeltConfig", "methods", "Layout", "backend"])
def test_plain_data_needs_torch_alone(name):
    names = imported(f"import pelt_fast; pelt_fast.{name}")
    assert not {name.split(".")[0] for name in names} & LIBRARIES


def test_info_imports_what_it_prints():
    names = imported("from pelt_fast.cli import main; main(['info'])")
    assert not {name.split(".")[0] for name in names} & LIBRARIES
    assert rooms(names) <= {
        "_C",
        "_C_cuda",
        "_version",
        "cli",
        "deprecated",
        "env",
        "ops",
        "reference",
    }
    assert {name for name in names if name.startswith("pelt_fast.cli.")} == {"pelt_fast.cli.info"}


def type_checked() -> dict[str, str]:
    """The imports that only a type checker sees, as name: module."""
    tree = ast.parse(inspect.getsource(pelt_fast))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_the_lists_of_public_names_agree():
    homes = {name: f"pelt_fast.{home}" for name, home in pelt_fast._HOME.items()}
    assert type_checked() == homes | {"functional": "pelt_fast"}
    assert set(pelt_fast.__all__) == {"__version__", "functional", *homes}
    assert dir(pelt_fast) == sorted(pelt_fast.__all__) == list(pelt_fast.__all__)
    assert sum(map(len, pelt_fast._HOMES.values())) == len(homes)  # none has two homes


@pytest.mark.parametrize("name", pelt_fast.__all__)
def test_a_public_name_is_what_its_home_defines(name):
    found = getattr(pelt_fast, name)
    if name in pelt_fast._HOME:
        home = importlib.import_module(f"pelt_fast.{pelt_fast._HOME[name]}")
        assert found is getattr(home, name) and found.__module__ == home.__name__
