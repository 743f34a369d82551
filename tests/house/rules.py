"""Which file may import which. A rule gives a line for each import that breaks it."""

from collections.abc import Iterator
from pathlib import Path

from .imports import Edge, circle, edges, files

# A room imports only rooms before it. A room is a folder or a file of pelt_fast; "pelt_fast" is its
# __init__, which hands out the public names.
ROOMS = (
    "_version", "env", "deprecated", "kernels", "ops", "functional", "config", "builders",
    "presets", "words", "modules",
    "layouts", "injection", "formats", "compose", "integrations", "trainer", "pelt_fast", "tasks",
    "testing", "cli", "__main__",
)  # fmt: skip
# what __init__ imports by name: nothing that needs more than torch
LIGHT = ("_version", "env", "deprecated", "functional")
# a file of an op's folder: the files of the same folder that it may import
ROLES = {
    "": ("api", "op"),  # its __init__
    "api": ("op",),
    "op": ("reference", "cpu", "gpu"),
    "reference": (),
    "cpu": (),
    "gpu": (),
}
# an op whose folder holds one file more, and the file that may import it
MORE = {"routed": ("segments", "api")}  # the rows of each method, for callers as well
COMMON = "pelt_fast.ops.common"
KERNELS = "pelt_fast.kernels"
DISPATCH = f"{COMMON}.dispatch"


def inside(name: str, package: str) -> bool:
    """Whether a file is a package or one of its files."""
    return name == package or name.startswith(package + ".")


def room(name: str) -> str:
    """The room of a file of pelt_fast."""
    steps = name.split(".")
    return steps[1] if len(steps) > 1 else steps[0]


def op_and_role(name: str) -> tuple[str, str] | None:
    """("lora", "cpu") of pelt_fast.ops.lora.cpu; None of what is not in an op's folder."""
    if not name.startswith("pelt_fast.ops.") or inside(name, COMMON):
        return None
    _, _, op, *rest = name.split(".")
    return op, rest[0] if rest else ""


def rooms_in_order(root: Path) -> Iterator[str]:
    """A room imports only rooms before it."""
    for edge in _within("pelt_fast", root):
        source, target = room(edge.source), room(edge.target)
        if "kernels" in (source, target) and {source, target} <= {"kernels", "ops"}:
            continue  # kernels_import_common_alone and kernels_are_for_gpu_files
        unknown = [name for name in (source, target) if name not in ROOMS]
        if unknown:
            yield f"{edge}: {unknown[0]} is not among the rooms"
        elif source == "pelt_fast":
            if target not in LIGHT:
                yield f"{edge}: pelt_fast/__init__.py finds this name when it is first used"
        elif ROOMS.index(target) > ROOMS.index(source):
            yield f"{edge}: {source} comes before {target}"


def ops_stand_alone(root: Path) -> Iterator[str]:
    """ops imports ops, env and kernels."""
    for edge in _within("pelt_fast.ops", root):
        if room(edge.target) not in ("ops", "env", "kernels"):
            yield f"{edge}: ops imports nothing of pelt_fast but ops, env and kernels"


def an_op_goes_one_way(root: Path) -> Iterator[str]:
    """api -> op -> {reference, cpu, gpu} -> ops/common, and never another op."""
    for edge in _within("pelt_fast.ops", root):
        source, target = op_and_role(edge.source), op_and_role(edge.target)
        if inside(edge.source, COMMON) and target is not None:
            yield f"{edge}: ops/common imports no op"
        if source is None or target is None:
            continue
        (op, role), (other, wanted) = source, target
        if other != op:
            yield f"{edge}: an op imports no other op; what two ops need is in ops/common"
        elif (
            wanted != role and wanted not in ROLES.get(role, ()) and MORE.get(op) != (wanted, role)
        ):
            allowed = ", ".join([*ROLES.get(role, ()), "ops/common"])
            yield f"{edge}: {role or '__init__'} imports {allowed} alone"


def the_reference_stands_alone(root: Path) -> Iterator[str]:
    """reference imports nothing of pelt_fast but ops/common."""
    for edge in _within("pelt_fast.ops", root):
        place = op_and_role(edge.source)
        if place is None or place[1] != "reference" or op_and_role(edge.target) is not None:
            continue
        if not inside(edge.target, COMMON):
            yield f"{edge}: reference imports nothing of pelt_fast but ops/common"


def kernels_are_for_gpu_files(root: Path) -> Iterator[str]:
    """In ops, gpu and ops/common/dispatch alone import kernels."""
    for edge in _within("pelt_fast.ops", root):
        if not inside(edge.target, KERNELS):
            continue
        place = op_and_role(edge.source)
        is_gpu = place is not None and place[1] == "gpu"
        if not is_gpu and not inside(edge.source, DISPATCH):
            yield f"{edge}: in ops, gpu and ops/common/dispatch alone import kernels"


def kernels_import_common_alone(root: Path) -> Iterator[str]:
    """kernels import nothing of pelt_fast but kernels and ops/common."""
    for edge in _within(KERNELS, root):
        if not inside(edge.target, KERNELS) and not inside(edge.target, COMMON):
            yield f"{edge}: kernels import nothing of pelt_fast but kernels and ops/common"


def functional_imports_apis_alone(root: Path) -> Iterator[str]:
    """functional re-exports ops/*/api."""
    for edge in _within("pelt_fast.functional", root):
        place = op_and_role(edge.target)
        if place is None or place[1] != "api":
            yield f"{edge}: functional imports ops/*/api alone"


def testing_is_for_judges(root: Path) -> Iterator[str]:
    """Nothing in pelt_fast imports testing but the check command."""
    for edge in _within("pelt_fast", root):
        if not inside(edge.target, "pelt_fast.testing"):
            continue
        if not inside(edge.source, "pelt_fast.testing") and edge.source != "pelt_fast.cli.check":
            yield f"{edge}: testing is for cli.check, benchmarks and tests alone"


def nothing_imports_tests(root: Path) -> Iterator[str]:
    """pelt_fast imports neither benchmarks nor tests, benchmarks import no tests."""
    for edge in edges(root):
        if inside(edge.target, "tests"):
            yield f"{edge}: nothing imports tests"
        elif inside(edge.target, "benchmarks") and inside(edge.source, "pelt_fast"):
            yield f"{edge}: nothing in pelt_fast imports benchmarks"


def no_circle(root: Path) -> Iterator[str]:
    """No file imports itself by way of others."""
    way = circle(edges(root))
    if way:
        yield f"{' -> '.join(way)}: a circle of files"


def an_op_is_five_files(root: Path) -> Iterator[str]:
    """A folder under ops holds api, op, reference, cpu and gpu (MORE: one more); ops holds folders
    alone."""
    ops: dict[str, set[str]] = {}
    for name, path in files(root).items():
        place = op_and_role(name)
        if place is None:
            continue
        op, role = place
        if not role and path.name != "__init__.py":
            yield f"{name}: ops holds folders alone"
        else:
            ops.setdefault(op, set()).add(role)
    wanted = ROLES.keys() - {""}
    for op, found in sorted(ops.items()):
        for role in sorted(found - {"", *MORE.get(op, ())[:1]} ^ wanted):
            yield f"pelt_fast.ops.{op}: {role} is {'missing' if role in wanted else 'a sixth file'}"


def _within(package: str, root: Path) -> list[Edge]:
    """The imports that files of a package make of files of pelt_fast."""
    return [
        edge for edge in edges(root)
        if inside(edge.source, package) and inside(edge.target, "pelt_fast")
    ]  # fmt: skip


RULES = (
    rooms_in_order, ops_stand_alone, an_op_goes_one_way, the_reference_stands_alone,
    kernels_are_for_gpu_files, kernels_import_common_alone, functional_imports_apis_alone,
    testing_is_for_judges, nothing_imports_tests, no_circle, an_op_is_five_files,
)  # fmt: skip
