"""The definition of the dropout mask."""

import math

import pytest
import torch

from pelt_fast.ops.common.dropout import (
    LEVELS,
    draw_seed,
    dropout,
    drops,
    keep_mask,
    keep_scale,
    philox4x32,
    threshold,
)

# known answers of the authors' own implementation (Random123, kat_vectors)
KNOWN = {
    7: {
        0x00000000: "5f6fb709 0d893f64 4f121f81 4f730a48",
        0xFFFFFFFF: "5207ddc2 45165e59 4d8ee751 8c52f662",
    },
    10: {
        0x00000000: "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        0xFFFFFFFF: "408f276d 41c83b0e a20bc7c6 6d5451fd",
    },
}


@pytest.mark.parametrize("rounds", KNOWN)
@pytest.mark.parametrize("word", [0x00000000, 0xFFFFFFFF])
def test_philox_gives_the_known_answers(rounds, word):
    value = torch.tensor(word)
    words = philox4x32([value] * 4, [value] * 2, rounds)
    assert " ".join(f"{int(w) & 0xFFFFFFFF:08x}" for w in words) == KNOWN[rounds][word]


def test_mask_is_the_documented_lane_of_the_documented_draw():
    p, seed = 0.3, torch.tensor([0x0123456789ABCDEF, 0x7EDCBA9876543210])
    mask = keep_mask(0, 40, p, seed)
    key = [seed[0] & 0xFFFFFFFF, seed[0] >> 32]
    for i in range(40):
        counter = [torch.tensor(i // 8), torch.tensor(0), seed[1] & 0xFFFFFFFF, seed[1] >> 32]
        words = [int(w) & 0xFFFFFFFF for w in philox4x32(counter, key)]
        lane = words[i % 8 // 2] >> (16 * (i % 2)) & 0xFFFF
        assert bool(mask[i]) == (lane >= round(p * 65536))


def test_mask_of_a_block_is_the_block_of_the_mask():
    seed = draw_seed(torch.device("cpu"))[0]
    whole = keep_mask(0, 2_000_003, 0.5, seed)  # two chunks
    edge = 8 << 17
    for start, stop in [(0, 1), (13, 1000), (edge - 1, edge + 1), (2_000_000, 2_000_003), (7, 7)]:
        assert torch.equal(keep_mask(start, stop, 0.5, seed), whole[start:stop])


def test_mask_past_two_to_the_32_draws_uses_the_high_word():
    seed = draw_seed(torch.device("cpu"))[0]
    far = 2**32 * 8
    assert not torch.equal(keep_mask(far, far + 64, 0.5, seed), keep_mask(0, 64, 0.5, seed))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_and_the_mean(p):
    x = torch.ones(500, 401)
    y = dropout(x, p, draw_seed(torch.device("cpu"))[0])
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs((y == 0).double().mean().item() - p) < 5 * deviation
    assert torch.all((y == 0) | (y == keep_scale(p)))


def test_seeds_follow_torchs_generator_and_differ():
    torch.manual_seed(5)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(first, draw_seed(torch.device("cpu")))
    assert not torch.equal(first, second)


def test_threshold_rounds_p_to_sixteen_bits_and_never_drops_all():
    assert threshold(0.0) == 0 and threshold(1e-9) == 0
    assert threshold(0.5) == 32768
    assert threshold(0.999999999) == 65535 and keep_scale(0.999999999) == 65536


def test_a_probability_drops_where_its_threshold_is_not_zero():
    half = 0.5 / LEVELS
    near = (half, math.nextafter(half, 0), math.nextafter(half, 1))
    for p in (*near, *(i / 2**19 for i in range(40)), 0.1, 0.999999999):
        assert drops(p) == (threshold(p) > 0), p
