"""Rows measured on a GPU by ``make gpu PART=tune``, which writes this file: read before the tables
of ``config``.

TILES       kernel -> arch -> (bits, limit, fields of Tile, why)
PLANS       arch -> (limit of rank, plan, why)
CONTEXT     arch -> library kernel
ONE_PASS    arch -> "triton" or "cuda"
FUSED_RANK  arch -> kernel -> the largest rank at which it beats the library
"""

# ruff: noqa: E501
# fmt: off
TILES: dict[str, dict[str, tuple]] = {
    'rank_up_bwd': {
        'sm90': (
            (16, 16, {'block_m': 64, 'block_n': 256, 'block_k': 0, 'block_r': 64, 'num_warps': 4, 'num_stages': 3, 'programs': 2}, 'rank_up_bwd R=16 0.0594 ms, 0.0813 before, on NVIDIA H200'),
            (16, 64, {'block_m': 128, 'block_n': 128, 'block_k': 0, 'block_r': 64, 'num_warps': 8, 'num_stages': 3, 'programs': 2}, 'rank_up_bwd R=64 0.1022 ms, 0.1497 before, on NVIDIA H200; (128, 256) is quicker, 0.0940 ms, but spills where a bias is asked for'),
        ),
    },
    'rank_down_norm': {
        'sm90': (
            (16, 64, {'block_m': 128, 'block_n': 0, 'block_k': 64, 'block_r': 64, 'num_warps': 8, 'num_stages': 3, 'programs': 2}, 'rank_down_norm R=16 0.0295 ms, 0.0545 before; rank_down_norm R=64 0.0331 ms, 0.0674 before, on NVIDIA H200'),
            (16, 128, {'block_m': 64, 'block_n': 0, 'block_k': 64, 'block_r': 128, 'num_warps': 8, 'num_stages': 2, 'programs': 2}, 'stays above 64: not measured'),
        ),
    },
    'rank_down': {
        'sm90': (
            (16, 16, {'block_m': 128, 'block_n': 0, 'block_k': 64, 'block_r': 64, 'num_warps': 8, 'num_stages': 4, 'programs': 2}, 'rank_down R=16 p=0.0 0.0273 ms, 0.0263 before; rank_down R=16 p=0.1 0.0334 ms, 0.0385 before, on NVIDIA H200'),
            (16, 32, {'block_m': 64, 'block_n': 0, 'block_k': 128, 'block_r': 32, 'num_warps': 4, 'num_stages': 4, 'programs': 2}, 'stays above 16: not measured'),
            (16, 64, {'block_m': 128, 'block_n': 0, 'block_k': 64, 'block_r': 64, 'num_warps': 8, 'num_stages': 4, 'programs': 2}, 'rank_down R=64 p=0.0 0.0352 ms, 0.0545 before; rank_down R=64 p=0.1 0.0532 ms, 0.0646 before, on NVIDIA H200'),
            (16, 128, {'block_m': 64, 'block_n': 0, 'block_k': 64, 'block_r': 128, 'num_warps': 8, 'num_stages': 2, 'programs': 2}, 'stays above 64: not measured'),
        ),
    },
    'rank_down_bwd': {
        'sm90': (
            (16, 16, {'block_m': 64, 'block_n': 0, 'block_k': 64, 'block_r': 64, 'num_warps': 4, 'num_stages': 4, 'programs': 4}, 'stays: rank_down_bwd R=16 p=0.0 0.0270 ms; rank_down_bwd R=16 p=0.1 0.0374 ms, on NVIDIA H200'),
            (16, 32, {'block_m': 64, 'block_n': 0, 'block_k': 128, 'block_r': 32, 'num_warps': 4, 'num_stages': 4, 'programs': 2}, 'stays above 16: not measured'),
            (16, 64, {'block_m': 64, 'block_n': 0, 'block_k': 128, 'block_r': 64, 'num_warps': 8, 'num_stages': 3, 'programs': 2}, 'rank_down_bwd R=64 p=0.0 0.0287 ms, 0.0338 before; rank_down_bwd R=64 p=0.1 0.0418 ms, 0.0547 before, on NVIDIA H200'),
            (16, 128, {'block_m': 64, 'block_n': 0, 'block_k': 128, 'block_r': 64, 'num_warps': 4, 'num_stages': 2, 'programs': 2}, 'stays above 64: not measured'),
        ),
    },
    'prefix_bwd': {
        'sm90': (
            (16, 64, {'block_m': 64, 'block_n': 64, 'block_k': 0, 'block_r': 0, 'num_warps': 4, 'num_stages': 1, 'programs': 2}, 'prefix_bwd P=30 (with zeroing dq) 0.0747 ms, 0.1032 before; prefix_bwd P=200 (with zeroing dq) 0.2837 ms, 0.4863 before, on NVIDIA H200'),
        ),
    },
    'prefix_bwd_dropped': {
        'sm90': (
            (16, 64, {'block_m': 64, 'block_n': 64, 'block_k': 0, 'block_r': 0, 'num_warps': 8, 'num_stages': 1, 'programs': 2}, 'stays: not measured; (64, 64, 4 warps) spills 8 bytes a thread'),
        ),
    },
    'prefix_short': {
        'sm90': (
            (16, 64, {'block_m': 64, 'block_n': 64, 'block_k': 0, 'block_r': 0, 'num_warps': 4, 'num_stages': 2, 'programs': 2}, 'prefix P=30 0.0417 ms, 0.0467 before, on NVIDIA H200'),
        ),
    },
    'prefix': {
        'sm90': (
            (16, 64, {'block_m': 128, 'block_n': 64, 'block_k': 0, 'block_r': 0, 'num_warps': 8, 'num_stages': 1, 'programs': 2}, 'prefix P=200 0.0986 ms, 0.1144 before, on NVIDIA H200'),
        ),
    },
    'norm': {
        'sm90': (
            (16, 64, {'block_m': 32, 'block_n': 0, 'block_k': 128, 'block_r': 64, 'num_warps': 4, 'num_stages': 3, 'programs': 2}, 'norm dx R=16 0.1023 ms, 0.1125 before; norm dx R=64 0.1172 ms, 0.1330 before, on NVIDIA H200'),
            (16, 1024, {'block_m': 64, 'block_n': 0, 'block_k': 128, 'block_r': 64, 'num_warps': 8, 'num_stages': 2, 'programs': 2}, 'stays above 64: not measured'),
        ),
    },
    'rank_down_bwd_norm': {
        'sm90': (
            (16, 64, {'block_m': 128, 'block_n': 0, 'block_k': 64, 'block_r': 64, 'num_warps': 4, 'num_stages': 1, 'programs': 2}, 'rank_down_bwd_norm R=16 0.0537 ms, 0.0577 before; rank_down_bwd_norm R=64 0.0672 ms, 0.0771 before, on NVIDIA H200'),
            (16, 128, {'block_m': 64, 'block_n': 0, 'block_k': 128, 'block_r': 64, 'num_warps': 4, 'num_stages': 1, 'programs': 2}, 'stays above 64: not measured'),
        ),
    },
    'adapter': {
        'sm90': (
            (16, 64, {'block_m': 32, 'block_n': 128, 'block_k': 128, 'block_r': 64, 'num_warps': 8, 'num_stages': 3, 'programs': 2}, 'adapter R=16 0.0897 ms, 0.0920 before; adapter R=16 norm 0.1191 ms, 0.1570 before; adapter R=64 0.1057 ms, 0.1085 before; adapter R=64 norm 0.1435 ms, 0.1619 before, on NVIDIA H200'),
        ),
    },
    'rank_up': {
        'sm90': (
            (16, 64, {'block_m': 64, 'block_n': 128, 'block_k': 0, 'block_r': 64, 'num_warps': 8, 'num_stages': 2, 'programs': 2}, 'rank_up R=16 p=0.0 on base 0.0356 ms, 0.0365 before; rank_up R=16 p=0.1 on base 0.0412 ms, 0.0433 before; rank_up R=64 p=0.0 on base 0.0425 ms, 0.0449 before; rank_up R=64 p=0.1 on base 0.0523 ms, 0.0584 before, on NVIDIA H200'),
        ),
    },
    'tail_gemm_masked': {
        'sm90': (
            (16, 1024, {'block_m': 64, 'block_n': 128, 'block_k': 64, 'block_r': 32, 'num_warps': 4, 'num_stages': 4, 'programs': 2}, 'tail_gemm dx R=16 p=0.1 0.5727 ms, 0.6583 before, on NVIDIA H200'),
        ),
    },
    'tail_gemm_descriptor': {
        'sm90': (
            (16, 1024, {'block_m': 128, 'block_n': 128, 'block_k': 64, 'block_r': 32, 'num_warps': 8, 'num_stages': 4, 'programs': 2}, 'tail_gemm forward R=16 descriptors 0.4166 ms, 0.5388 before; tail_gemm dx R=16 p=0.1 descriptors 0.4213 ms, 0.5439 before, on NVIDIA H200'),
        ),
    },
    'routed_up_bwd': {
        'sm90': (
            (16, 64, {'block_m': 64, 'block_n': 128, 'block_k': 0, 'block_r': 32, 'num_warps': 4, 'num_stages': 2, 'programs': 4}, 'routed_up_bwd R=16 p=0.0 0.0418 ms, 0.0477 before; routed_up_bwd R=16 p=0.1 0.0430 ms, 0.0523 before; routed_up_bwd R=64 p=0.0 0.0937 ms, 0.1113 before; routed_up_bwd R=64 p=0.1 0.1229 ms, 0.1085 before, on NVIDIA H200'),
            (16, 1024, {'block_m': 64, 'block_n': 128, 'block_k': 0, 'block_r': 32, 'num_warps': 8, 'num_stages': 3, 'programs': 2}, 'stays above 64: not measured'),
        ),
    },
    'routed_down': {
        'sm90': (
            (16, 16, {'block_m': 32, 'block_n': 0, 'block_k': 128, 'block_r': 32, 'num_warps': 4, 'num_stages': 4, 'programs': 2}, 'routed_down R=16 p=0.0 0.0269 ms, 0.0350 before; routed_down R=16 p=0.1 0.0359 ms, 0.0536 before, on NVIDIA H200'),
            (16, 32, {'block_m': 64, 'block_n': 0, 'block_k': 128, 'block_r': 32, 'num_warps': 4, 'num_stages': 2, 'programs': 2}, 'stays above 16: not measured'),
            (16, 64, {'block_m': 64, 'block_n': 0, 'block_k': 64, 'block_r': 32, 'num_warps': 4, 'num_stages': 4, 'programs': 2}, 'routed_down R=64 p=0.0 0.0413 ms, 0.0601 before; routed_down R=64 p=0.1 0.0730 ms, 0.0712 before, on NVIDIA H200'),
            (16, 1024, {'block_m': 64, 'block_n': 0, 'block_k': 64, 'block_r': 64, 'num_warps': 4, 'num_stages': 2, 'programs': 2}, 'stays above 64: not measured'),
        ),
    },
    'routed_down_bwd': {
        'sm90': (
            (16, 64, {'block_m': 64, 'block_n': 0, 'block_k': 64, 'block_r': 32, 'num_warps': 4, 'num_stages': 2, 'programs': 8}, 'routed_down_bwd R=16 p=0.0 0.0288 ms, 0.0334 before; routed_down_bwd R=16 p=0.1 0.0434 ms, 0.0581 before; routed_down_bwd R=64 p=0.0 0.0411 ms, 0.0527 before; routed_down_bwd R=64 p=0.1 0.0765 ms, 0.1095 before, on NVIDIA H200'),
            (16, 1024, {'block_m': 64, 'block_n': 0, 'block_k': 128, 'block_r': 32, 'num_warps': 4, 'num_stages': 3, 'programs': 2}, 'stays above 64: not measured'),
        ),
    },
    'routed_up': {
        'sm90': (
            (16, 64, {'block_m': 64, 'block_n': 128, 'block_k': 0, 'block_r': 32, 'num_warps': 4, 'num_stages': 2, 'programs': 2}, 'routed_up R=16 p=0.0 0.0507 ms, 0.0559 before; routed_up R=16 p=0.1 0.0512 ms, 0.0686 before; routed_up R=64 p=0.0 0.0692 ms, 0.0723 before; routed_up R=64 p=0.1 0.0757 ms, 0.0994 before, on NVIDIA H200'),
            (16, 1024, {'block_m': 64, 'block_n': 128, 'block_k': 0, 'block_r': 32, 'num_warps': 8, 'num_stages': 1, 'programs': 2}, 'stays above 64: not measured'),
        ),
    },
}
PLANS: dict[str, tuple] = {
    'sm90': (
        (16, 'accumulate', 'LoRA linear 4096 R=16 p=0.0 on NVIDIA H200: accumulate 0.932, tail 1.148, tail_descriptor 0.952, tail_cuda 1.165 ms'),
        (1024, 'accumulate', 'not measured'),
    ),
}
CONTEXT: dict[str, str] = {'sm90': 'cudnn'}
ONE_PASS: dict[str, str] = {'sm90': 'triton'}
FUSED_RANK: dict[str, dict[str, int]] = {
    'sm90': {'rank_down': 0, 'rank_down_bwd': 0, 'rank_up': 93, 'rank_up_bwd': 37, 'adapter': 128},
}
# fmt: on
