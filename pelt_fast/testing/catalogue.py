"""Every case: each op in each of its forms."""

from collections.abc import Iterator

from .adapter import adapter_case
from .case import Case
from .lora import lora_case
from .prefix_attention import prefix_case, routed_prefix_case
from .routed import routed_case
from .widened_ffn import ffn_case


def cases(sizes: tuple[int, int, int, int] = (37, 52, 44, 5)) -> Iterator[Case]:
    """Every op in every form; ``sizes`` are M, K, N, R of the low-rank and FFN cases."""
    for p in (0.0, 0.1):
        yield lora_case(*sizes, p)
        for layer_norm in ("none", "in", "out"):
            for base in (True, False):
                yield adapter_case(*sizes, p, layer_norm, base)
        for gated in (False, True):
            yield ffn_case(*sizes, p, gated)
        yield ffn_case(*sizes, p, gated=False, separate=True)
        yield lora_case(*sizes, p, beside=True)
        yield ffn_case(*sizes, p, gated=False, beside=True)
        yield ffn_case(*sizes, p, gated=True, separate=True, beside=True)
        for adapter in (False, True):
            yield routed_case(*sizes, p, adapter)
        for form, composition in (("softmax", "gated"), ("softmax", "add"), ("relu", "add")):
            yield prefix_case(p, form, composition, causal=form == "softmax", masked=p == 0)
            yield routed_prefix_case(p, form, composition)
        yield prefix_case(p, "softmax", "gated", causal=False, masked=True)
