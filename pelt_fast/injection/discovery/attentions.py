"""The attentions of a model, from what its attention function was given."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pelt_fast.layouts.layout import AttentionLayout
from pelt_fast.layouts.names import modules_of

from .graph import Graph, used_rows
from .trace import Attended, Call, Trace


@dataclass(eq=False)
class Found:
    """One attention: its call, its module's path from the base, and its projections' calls."""

    attended: Attended
    path: str
    projections: dict[str, tuple[Call, str]]  # q, k, v, out: the call, and which of its rows
    unknown: dict[str, str]  # those that were not found, and why
    is_cross: bool

    def layout(self, layer: str) -> AttentionLayout:
        """As a layer at the path ``layer`` describes it."""
        inside = {part: (call, rows) for part, (call, rows) in self.projections.items()
                  if call.path.startswith(f"{layer}.")}  # fmt: skip
        paths = {part: _path(call, rows, part, layer) for part, (call, rows) in inside.items()}
        outside = {
            part: f"{call.path} is outside of the layer"
            for part, (call, _) in self.projections.items()
            if part not in inside
        }
        causal = "decoder" if self.attended.causal else "encoder"
        return AttentionLayout(
            "cross" if self.is_cross else causal, below(self.path, layer),
            *(paths.get(part) for part in ("q", "k", "v", "out")),
            heads=self.attended.heads,
            unknown=tuple(sorted((self.unknown | outside).items())),
        )  # fmt: skip


def below(path: str, layer: str) -> str:
    """A path from the base as one from the layer."""
    return path.removeprefix(layer).removeprefix(".")


def _path(call: Call, rows: str, part: str, layer: str) -> str:
    path = below(call.path, layer)
    if rows:
        return f"{path}:{part}={rows}"
    return f"{path}:" if isinstance(call.module, Conv1D) else path


def attentions(trace: Trace, graph: Graph, base: nn.Module) -> list[Found]:
    """The attentions that the forward ran, each module once."""
    paths = {module: path for path, module in modules_of(base).items()}
    found: dict[nn.Module, Found] = {}
    for attended in trace.attended:
        if attended.module in paths and attended.module not in found:
            found[attended.module] = _attention(attended, paths[attended.module], trace, graph)
    return list(found.values())


def _attention(attended: Attended, path: str, trace: Trace, graph: Graph) -> Found:
    projections: dict[str, tuple[Call, str]] = {}
    unknown: dict[str, str] = {}
    tensors = {"q": attended.query, "k": attended.key, "v": attended.value}
    nearest = {part: graph.nearest(tensor) for part, tensor in tensors.items()}
    for part, calls in nearest.items():
        if len(calls) != 1:
            names = ", ".join(call.path for call in calls) or "no linear layer"
            unknown[part] = f"it is made by {names}"
            continue
        others = [call for other, each in nearest.items() if other != part for call in each]
        try:
            rows = used_rows(tensors[part], calls[0]) if calls[0] in others else ""
        except (ValueError, RuntimeError) as error:
            unknown[part] = f"of {calls[0].path}: {error}"
            continue
        projections[part] = calls[0], rows
    out = _output(attended, trace, graph)
    if out is None:
        unknown["out"] = "no linear layer reads what the attention returns"
    else:
        projections["out"] = out, ""
    _check_input(path, trace, projections, unknown)
    for part in _called_otherwise(path, trace, projections, unknown):
        del projections[part]
    if attended.why_no_prefix:
        unknown["heads"] = attended.why_no_prefix
    elif any(graph.nearest(bias) for bias in attended.biases):
        unknown["heads"] = "what is added to its scores is made of the layer's input"
    return Found(attended, path, projections, unknown, _is_cross(attended, projections))


def _called_otherwise(path: str, trace: Trace, projections: dict, unknown: dict) -> list[str]:
    """The projections that a forward does not call as often as their attention."""
    calls, found = trace.by_path, []
    times = len(calls.get(path, ()))
    for part, (call, _) in projections.items():
        count = len(calls[call.path])
        if times and count != times:
            unknown[part] = f"{call.path} is called {count} times, its attention {times}"
            found.append(part)
    return found


def _output(attended: Attended, trace: Trace, graph: Graph) -> Call | None:
    """The first later linear layer that reads what the attention returned."""
    for call in graph.linears:
        if call.began > attended.at and graph.comes_from(call.input, attended.node):
            return call
    return None


def _check_input(path: str, trace: Trace, projections: dict, unknown: dict) -> None:
    """What a parallel adapter reads, the first tensor of the attention's module, must be what the
    queries are made of."""
    calls = trace.by_path.get(path, [])
    if "q" in projections and calls and not _same(calls[0].input, projections["q"][0].input):
        unknown["input"] = "its first input is not what its queries are made of"


def _is_cross(attended: Attended, projections: dict) -> bool:
    """Whether keys are made of another sequence than queries."""
    if attended.lengths is not None and attended.lengths[0] != attended.lengths[1]:
        return True
    if not projections.keys() >= {"q", "k"}:
        return False
    q, k = projections["q"][0].input, projections["k"][0].input
    return q.shape[1] != k.shape[1]


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    return one is two or (one is not None and two is not None and one.data_ptr() == two.data_ptr()
                          and one.shape == two.shape)  # fmt: skip
