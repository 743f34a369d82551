"""FlexAttention over [prefix; context], the prefix visible in its block mask."""

from collections.abc import Iterator

import torch

from benchmarks.problems import Absent, Problem, Provider
from benchmarks.subjects import prefix_mask

NAME = "FlexAttention"


def layer(problem: Problem) -> Iterator[Provider | Absent]:
    """FlexAttention under torch.compile."""
    if not problem.subject.startswith("prefix"):
        return
    if problem.device.type == "cpu":
        yield Absent(NAME, "it has no backward on a CPU")
        return
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, _ = problem.inputs
    mask, blocks = prefix_mask(problem, problem.frozen), None
    if mask is not None:
        full = mask.expand(q.shape[0], 1, q.shape[2], -1)
        blocks = create_block_mask(
            lambda b, h, i, j: full[b, 0, i, j], q.shape[0], None, q.shape[2],
            k.shape[2] + problem.size, device=q.device,
        )  # fmt: skip
    grouped = q.shape[1] != k.shape[1]

    def call(q, k, v):
        both = [
            torch.cat([p.to(q.dtype).expand(q.shape[0], -1, -1, -1), t], 2)
            for p, t in zip(problem.trained.values(), (k, v))
        ]
        return compiled(q, *both, block_mask=blocks, enable_gqa=grouped)

    yield Provider(NAME, call, problem.trained)
