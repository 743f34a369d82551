"""Helpers with two callers or more: the dropout mask, activations and their derivatives, casts.

The mask is that of ``ops.common.dropout``, bit for bit: Philox4x32-7, one draw of 128 bits
for 8 elements of the row-major tensor.
Integer work  about 60 operations a draw. 8 elements share one draw if the tensor's width is a
multiple of 8 and a thread holds 8 elements of a row: the compiler finds one index // 8 for all.
"""

import triton
import triton.language as tl
from triton.language.random import philox_impl

ROUNDS = tl.constexpr(7)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def draw_words(seed_ptr, draw):
    """The four random words of each draw (int64); seed is (key, offset)."""
    key = tl.load(seed_ptr)
    offset = tl.load(seed_ptr + 1)
    return philox_impl(
        (draw & 0xFFFFFFFF).to(tl.uint32),
        ((draw >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (offset & 0xFFFFFFFF).to(tl.uint32),
        ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (key & 0xFFFFFFFF).to(tl.uint32),
        ((key >> 32) & 0xFFFFFFFF).to(tl.uint32),
        ROUNDS,
    )


@triton.jit
def compare(word, threshold, place: tl.constexpr):
    """The two lanes of a word: bits ``place`` and ``place + 1``."""
    low = ((word & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32)
    high = ((word >> 16).to(tl.int32) >= threshold).to(tl.int32)
    return (low << place) | (high << (place + 1))


@triton.jit
def draw_bits(seed_ptr, draw, threshold):
    """The mask of each draw's 8 elements as bits, low bit first."""
    w0, w1, w2, w3 = draw_words(seed_ptr, draw)
    bits = compare(w0, threshold, 0) | compare(w1, threshold, 2)
    return bits | compare(w2, threshold, 4) | compare(w3, threshold, 6)


@triton.jit
def unpack(bits, BLOCK: tl.constexpr):
    """Bits [rows, BLOCK / 8] as a mask [rows, BLOCK]."""
    lanes = (bits.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(lanes, (bits.shape[0], BLOCK)) != 0


@triton.jit
def load_mask(bits_ptr, rows, first_column, M, width, BLOCK: tl.constexpr):
    """The mask of a tile [rows, BLOCK] from the bits (M, width / 8) of ``mask_bits``."""
    offs = first_column // 8 + tl.arange(0, BLOCK // 8)
    place = bits_ptr + rows[:, None] * (width // 8) + offs[None, :]
    inside = (rows < M)[:, None] & (offs < width // 8)[None, :]
    return unpack(tl.load(place, mask=inside, other=0), BLOCK)


@triton.jit
def keep_tile(
    seed_ptr, rows, first_column, width, threshold, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """The mask of a tile [rows, BLOCK] of a row-major tensor ``width`` wide.

    rows are int64; first_column is a multiple of 8. ALIGNED: width is a multiple of 8 as well.
    Otherwise a row may start inside a draw, and each element computes its own draw.
    """
    if ALIGNED:
        draws = first_column // 8 + tl.arange(0, BLOCK // 8)
        draw = (rows * (width // 8))[:, None] + draws[None, :]
        return unpack(draw_bits(seed_ptr, draw, threshold), BLOCK)
    else:
        columns = tl.arange(0, BLOCK)
        index = (rows * width + first_column)[:, None] + columns[None, :]
        lane = (index % 8).to(tl.int32)
        w0, w1, w2, w3 = draw_words(seed_ptr, index // 8)
        word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
        bits = (word >> ((lane & 1) * 16).to(tl.uint32)) & 0xFFFF
        return bits.to(tl.int32) >= threshold


@triton.jit
def sigmoid(t):
    return 1.0 / (1.0 + tl.exp(-t))


@triton.jit
def tanh(t):
    # exp of a negative number only: no overflow for large or small t
    e = tl.exp(-2.0 * tl.abs(t))
    size = (1.0 - e) / (1.0 + e)
    return tl.where(t < 0, -size, size)


@triton.jit
def activate(t, ACTIVATION: tl.constexpr):
    """f(t) of an fp32 tile."""
    if ACTIVATION == "relu":
        return tl.maximum(t, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        return 0.5 * t * (1.0 + tl.erf(t * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * t * (1.0 + tanh(SQRT_2_OVER_PI * (t + CUBIC * t * t * t)))
    elif ACTIVATION == "silu":
        return t * sigmoid(t)
    elif ACTIVATION == "tanh":
        return tanh(t)
    else:
        return t


@triton.jit
def derivative(t, ACTIVATION: tl.constexpr):
    """f'(t) of an fp32 tile; ReLU's is 0 at 0."""
    if ACTIVATION == "relu":
        return tl.where(t > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * t * t) * INV_SQRT_2_PI
        return 0.5 * (1.0 + tl.erf(t * SQRT_HALF)) + t * density
    elif ACTIVATION == "gelu_tanh":
        inner = tanh(SQRT_2_OVER_PI * (t + CUBIC * t * t * t))
        slope = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * t * t)
        return 0.5 * (1.0 + inner) + 0.5 * t * (1.0 - inner * inner) * slope
    elif ACTIVATION == "silu":
        gate = sigmoid(t)
        return gate * (1.0 + t * (1.0 - gate))
    elif ACTIVATION == "tanh":
        inner = tanh(t)
        return 1.0 - inner * inner
    else:
        return tl.full(t.shape, 1.0, tl.float32)


@triton.jit
def bottleneck(
    t,
    seed_ptr,
    rows,
    first_rank,
    R,
    threshold,
    keep_scale,
    ACTIVATION: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """drop(f(t)) of a tile [rows, BLOCK_R] of pre-activations (M, R), in fp32."""
    h = activate(t, ACTIVATION)
    if DROP:
        keep = keep_tile(seed_ptr, rows, first_rank, R, threshold, ALIGNED, BLOCK_R)
        h = tl.where(keep, h * keep_scale, 0.0)
    return h


@triton.jit
def store_rank(
    acc,
    bias_ptr,
    seed_ptr,
    out_ptr,
    h_ptr,
    rows,
    first_rank,
    M,
    R,
    threshold,
    keep_scale,
    stride_om,
    stride_hm,
    HAS_BIAS: tl.constexpr,
    HAS_H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = acc + bias and, with HAS_H, h = drop(f(out)) of a tile [rows, BLOCK_R] of (M, R)."""
    offs_r = first_rank + tl.arange(0, BLOCK_R)
    mask = (rows < M)[:, None] & (offs_r < R)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_r, mask=offs_r < R, other=0.0).to(tl.float32)[None, :]
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * stride_om + offs_r[None, :], out, mask=mask)
    if HAS_H:
        # f of the rounded value, which is stored and which backward will read
        h = bottleneck(
            out.to(tl.float32), seed_ptr, rows, first_rank, R, threshold, keep_scale,
            ACTIVATION, DROP, ALIGNED, BLOCK_R,
        )  # fmt: skip
        h = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows[:, None] * stride_hm + offs_r[None, :], h, mask=mask)


@triton.jit
def dot(a, b, acc):
    """acc + a b, fp32 operands exact (no tf32)."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def column_sums(x):
    """The sums over the rows of a tile; their number is a power of two, at least 2.

    By halves: each exchange moves a tile through shared memory without bank conflicts. ``tl.sum``
    over rows that several warps hold stores numbers of one bank, up to 32 at once.
    """
    return _pair_sums(tl.trans(x))


@triton.jit
def _pair_sums(x):
    if x.shape[1] == 2:
        low, high = tl.split(x)
        return low + high
    else:
        low, high = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        return _pair_sums(low + high)


@triton.jit
def fold(x, ROWS: tl.constexpr):
    """The sums of every ROWS-th row of a tile, [ROWS, columns]. A thread that holds all of them, as
    in the layout of a load of 16 bytes a thread if ROWS is 16, sums without an exchange."""
    return tl.sum(tl.reshape(x, (x.shape[0] // ROWS, ROWS, x.shape[1])), 0)


@triton.jit
def load_rows(ptr, stride, offs, limit, offs_d, D):
    """A tile [offs, offs_d] of a matrix with ``limit`` rows and D columns."""
    mask = (offs < limit)[:, None] & (offs_d < D)[None, :]
    return tl.load(
        ptr + offs.to(tl.int64)[:, None] * stride + offs_d[None, :], mask=mask, other=0.0
    )
