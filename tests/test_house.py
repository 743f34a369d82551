"""The house keeps its rules: imports go one way, files are small. Each rule can fail, too."""

from pathlib import Path

import pytest

from tests.house import rules, sizes

ROOT = Path(__file__).resolve().parents[1]
RULES = {rule.__name__: rule for rule in (*rules.RULES, *sizes.RULES)}

# a small house that keeps every rule
GOOD = {
    "pelt_fast/__init__.py": "from pelt_fast import deprecated\n"
    "from typing import TYPE_CHECKING\n"
    "if TYPE_CHECKING:\n    from pelt_fast.tasks import train",
    "pelt_fast/env.py": "",
    "pelt_fast/deprecated.py": "",
    "pelt_fast/ops/common/dropout.py": "import torch",
    "pelt_fast/ops/common/dispatch.py": "from pelt_fast import env\n"
    "def tiles():\n    from pelt_fast.kernels import tiles",
    "pelt_fast/ops/lora/__init__.py": "",
    "pelt_fast/ops/lora/api.py": "from . import op\nfrom ..common.dropout import draw_seed",
    "pelt_fast/ops/lora/op.py": "from . import cpu, gpu, reference",
    "pelt_fast/ops/lora/reference.py": "from pelt_fast.ops.common import dropout",
    "pelt_fast/ops/lora/cpu.py": "from pelt_fast import _C\nfrom pelt_fast.ops.common import dropout",
    "pelt_fast/ops/lora/gpu.py": "from pelt_fast.kernels import tiles",
    "pelt_fast/functional.py": "from pelt_fast.ops.lora.api import lora_linear",
    "pelt_fast/modules/lora.py": "from pelt_fast.functional import lora_linear",
    "pelt_fast/tasks/train.py": "import pelt_fast\nfrom pelt_fast.modules.lora import LoRALinear",
    "pelt_fast/testing/__init__.py": "from pelt_fast import functional",
    "pelt_fast/cli/check.py": "from pelt_fast import testing",
    "kernels/tiles.py": "from pelt_fast.ops.common import dropout",
    "benchmarks/bench.py": "from pelt_fast import testing",
}

# a rule, the files that break it, the line that names the edge
BROKEN = [
    (
        "rooms_in_order",
        {"pelt_fast/modules/lora.py": "def f():\n    from pelt_fast.tasks import train"},
        "pelt_fast.modules.lora -> pelt_fast.tasks.train: modules comes before tasks",
    ),
    (
        "rooms_in_order",
        {"pelt_fast/modules/lora.py": "import pelt_fast"},
        "pelt_fast.modules.lora -> pelt_fast: modules comes before pelt_fast",
    ),
    (
        "rooms_in_order",
        {"pelt_fast/__init__.py": "from pelt_fast.modules.lora import LoRALinear"},
        "pelt_fast -> pelt_fast.modules.lora: pelt_fast/__init__.py finds this name when it is"
        " first used",
    ),
    (
        "rooms_in_order",
        {"pelt_fast/shed/tools.py": "from pelt_fast import env"},
        "pelt_fast.shed.tools -> pelt_fast.env: shed is not among the rooms",
    ),
    (
        "ops_stand_alone",
        {"pelt_fast/config.py": "", "pelt_fast/ops/lora/api.py": "from pelt_fast.config import X"},
        "pelt_fast.ops.lora.api -> pelt_fast.config: ops imports nothing of pelt_fast but ops, env"
        " and kernels",
    ),
    (
        "an_op_goes_one_way",
        {"pelt_fast/ops/lora/cpu.py": "def f():\n    from .reference import lora_forward"},
        "pelt_fast.ops.lora.cpu -> pelt_fast.ops.lora.reference: cpu imports ops/common alone",
    ),
    (
        "an_op_goes_one_way",
        {"pelt_fast/ops/lora/gpu.py": "from importlib import import_module\n"
                                      'import_module("pelt_fast.ops.lora.cpu")'},
        "pelt_fast.ops.lora.gpu -> pelt_fast.ops.lora.cpu: gpu imports ops/common alone",
    ),
    (
        "an_op_goes_one_way",
        {"pelt_fast/ops/lora/op.py": "from . import api"},
        "pelt_fast.ops.lora.op -> pelt_fast.ops.lora.api: op imports reference, cpu, gpu, ops/common"
        " alone",
    ),
    (
        "an_op_goes_one_way",
        {"pelt_fast/ops/lora/api.py": "from . import cpu"},
        "pelt_fast.ops.lora.api -> pelt_fast.ops.lora.cpu: api imports op, ops/common alone",
    ),
    (
        "an_op_goes_one_way",
        {"pelt_fast/ops/adapter/cpu.py": "from pelt_fast.ops.lora import cpu"},
        "pelt_fast.ops.adapter.cpu -> pelt_fast.ops.lora.cpu: an op imports no other op; what two"
        " ops need is in ops/common",
    ),
    (
        "an_op_goes_one_way",
        {"pelt_fast/ops/common/dropout.py": "from ..lora import cpu"},
        "pelt_fast.ops.common.dropout -> pelt_fast.ops.lora.cpu: ops/common imports no op",
    ),
    (
        "the_reference_stands_alone",
        {"pelt_fast/ops/lora/reference.py": "from pelt_fast import env"},
        "pelt_fast.ops.lora.reference -> pelt_fast.env: reference imports nothing of pelt_fast but"
        " ops/common",
    ),
    (
        "kernels_are_for_gpu_files",
        {"pelt_fast/ops/lora/cpu.py": "import pelt_fast.kernels.tiles"},
        "pelt_fast.ops.lora.cpu -> pelt_fast.kernels.tiles: in ops, gpu and ops/common/dispatch"
        " alone import kernels",
    ),
    (
        "kernels_import_common_alone",
        {"kernels/tiles.py": "from pelt_fast.ops.lora.reference import lora_forward"},
        "pelt_fast.kernels.tiles -> pelt_fast.ops.lora.reference: kernels import nothing of"
        " pelt_fast but kernels and ops/common",
    ),
    (
        "functional_imports_apis_alone",
        {"pelt_fast/functional.py": "from pelt_fast.ops.lora import op"},
        "pelt_fast.functional -> pelt_fast.ops.lora.op: functional imports ops/*/api alone",
    ),
    (
        "testing_is_for_judges",
        {"pelt_fast/cli/info.py": "from pelt_fast import testing"},
        "pelt_fast.cli.info -> pelt_fast.testing: testing is for cli.check, benchmarks and tests"
        " alone",
    ),
    (
        "nothing_imports_tests",
        {"pelt_fast/cli/bench.py": 'import importlib\nimportlib.import_module("benchmarks.bench")'},
        "pelt_fast.cli.bench -> benchmarks.bench: nothing in pelt_fast imports benchmarks",
    ),
    (
        "nothing_imports_tests",
        {"benchmarks/bench.py": "from tests.small import MODELS"},
        "benchmarks.bench -> tests.small: nothing imports tests",
    ),
    (
        "no_circle",
        {"pelt_fast/modules/lora.py": "from . import a", "pelt_fast/modules/a.py": "from . import b",
         "pelt_fast/modules/b.py": "def f():\n    from .a import g"},
        "pelt_fast.modules.a -> pelt_fast.modules.b -> pelt_fast.modules.a: a circle of files",
    ),
    (
        "an_op_is_five_files",
        {"pelt_fast/ops/lora/helpers.py": ""},
        "pelt_fast.ops.lora: helpers is a sixth file",
    ),
    (
        "an_op_goes_one_way",
        {"pelt_fast/ops/routed/segments.py": "",
         "pelt_fast/ops/routed/cpu.py": "from .segments import segments_of"},
        "pelt_fast.ops.routed.cpu -> pelt_fast.ops.routed.segments: cpu imports ops/common alone",
    ),
    ("an_op_is_five_files", {"pelt_fast/ops/low_rank.py": ""},
     "pelt_fast.ops.low_rank: ops holds folders alone"),
    ("files_are_short", {"csrc/cpu/rank.cpp": "\n" * 351},
     "csrc/cpu/rank.cpp: 351 lines, at most 350"),
    (
        "few_positional_parameters",
        {"pelt_fast/modules/lora.py": "class A:\n    def f(self, a, b, c, d, e, f, g, h, i): ..."},
        "pelt_fast.modules.lora.f: 9 positional parameters, at most 8",
    ),
    (
        "saved_tensors_are_read_once",
        {
            "pelt_fast/ops/lora/op.py": "def backward(ctx, dy):\n"
            "    return ctx.saved_tensors[0], ctx.saved_tensors[1]"
        },
        "pelt_fast.ops.lora.op.backward: reads saved_tensors 2 times, at most once",
    ),
    (
        "a_struct_has_a_name_of_its_own",
        {"csrc/cpu/a.h": "struct Method {\n", "csrc/cpu/b.h": "struct Method {\n"},
        "csrc/cpu/b.h: struct Method is in csrc/cpu/a.h too",
    ),
    ("functions_are_short", {"pelt_fast/env.py": ("def f():\n" + "    x = 1\n" * 26) * 3},
     "the median function has 27 lines, at most 25"),
]  # fmt: skip


def build(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_house_keeps(rule):
    broken = list(rule(ROOT))
    assert not broken, f"{rule.__doc__}\n" + "\n".join(broken)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_good_house_passes(rule, tmp_path):
    assert list(rule(build(tmp_path, GOOD))) == []


@pytest.mark.parametrize("name, files, line", BROKEN, ids=lambda value: str(value)[:40])
def test_a_broken_rule_names_the_edge(name, files, line, tmp_path):
    assert line in list(RULES[name](build(tmp_path, GOOD | files)))


def test_every_rule_has_a_house_that_breaks_it():
    assert {name for name, _, _ in BROKEN} == set(RULES)
