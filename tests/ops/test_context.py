"""The library's CUDA context kernels, asked on meta tensors: schemas and shapes, without a GPU."""

import pytest
import torch

from pelt_fast.kernels import config
from pelt_fast.ops.prefix_attention.gpu import context_forward, kernel_for
from tests.flat import context_backward

B, H, G, T, S, D = 2, 4, 2, 40, 56, 32
CASES = {
    "flash": ("flash", torch.bfloat16, None, False),
    "flash causal": ("flash", torch.bfloat16, None, True),
    "cudnn": ("cudnn", torch.bfloat16, None, False),
    "cudnn, bool mask": ("cudnn", torch.bfloat16, torch.bool, False),
    "cudnn, additive mask, causal": ("cudnn", torch.bfloat16, torch.float32, True),
    "fp32": ("efficient", torch.float32, None, False),
    "bool mask": ("efficient", torch.bfloat16, torch.bool, False),
    "additive mask, causal": ("efficient", torch.bfloat16, torch.float32, True),
}


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("name", CASES)
def test_context_calls_the_library_by_its_schema(name, p):
    kernel, dtype, mask_dtype, causal = CASES[name]
    keys = T if causal and kernel == "flash" else S
    answer = kernel if kernel != "efficient" else "flash"
    with config.forced("context", answer):

        def empty(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        q, do, o = (empty(B, T, H, D).transpose(1, 2) for _ in range(3))
        k, v = (empty(B, keys, G, D).transpose(1, 2) for _ in range(2))
        mask = None if mask_dtype is None else empty(B, 1, T, keys, dtype=mask_dtype)
        if kernel == "cudnn" and p > 0:  # whose dropout has a step of 1 / 16
            kernel = "flash" if mask is None else "efficient"
        assert kernel_for(q, k, mask, causal, p) == kernel
        out, lse, rng = context_forward(q, k, v, mask, causal, 0.2, p)
        assert out.shape == (B, H, T, D) and out.dtype == dtype
        assert lse.shape == (B, H, T) and lse.dtype == torch.float32
        assert (rng is None) == (p == 0) and (rng is None or rng.dtype == torch.int64)
        joint = empty(B, H, T, dtype=torch.float32)
        grads = context_backward(do, q, k, v, o, joint, rng, mask, causal, 0.2, p)
        for grad, like in zip(grads, (q, k, v)):
            assert grad.shape == like.shape and grad.dtype == dtype
            assert grad.transpose(1, 2).is_contiguous()
