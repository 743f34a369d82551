"""The implementations of each op by its flat arguments, as the op library calls them."""

from types import SimpleNamespace

from pelt_fast.ops.adapter.op import adapter_bwd, adapter_fwd
from pelt_fast.ops.common.bundles import QKV, AttentionOutput, Scores
from pelt_fast.ops.lora.op import lora_bwd, lora_fwd
from pelt_fast.ops.widened_ffn.op import ffn_bwd, ffn_fwd


def _implementations(where: str) -> SimpleNamespace:
    ops = dict(lora_forward=lora_fwd, lora_backward=lora_bwd, adapter_forward=adapter_fwd,
               adapter_backward=adapter_bwd, ffn_forward=ffn_fwd, ffn_backward=ffn_bwd)  # fmt: skip
    return SimpleNamespace(**{name: getattr(op, where) for name, op in ops.items()})


reference, cpu, gpu = map(_implementations, ("reference", "cpu", "gpu"))


def context_backward(do, q, k, v, o, lse, rng, mask, causal, scale, p):
    """The library's context kernels on a GPU, backward."""
    from pelt_fast.ops.prefix_attention.gpu import context_backward

    output = AttentionOutput(o, lse, o, rng)
    return context_backward(do, QKV(q, k, v), output, Scores(mask, causal, scale), p)
