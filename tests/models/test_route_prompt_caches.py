"""Generation and caches under prompts of several methods: each row goes on as its own method alone
does, and a cache that other routes filled is refused."""

import copy
import pickle

import pytest
import torch

import pelt_fast
from pelt_fast.injection.method_names import parameters_of_method
from tests.models.test_parity import PADDINGS
from tests.models.test_prompt_caches import decoder
from tests.models.test_route_prompt import MIXTURE, T, generated, made, part, ready, rows_of
from tests.small import PAD, inputs


def assert_generates_alone(alone, together, batch, per_row=1, **options):
    with pelt_fast.route(together, MIXTURE):
        found = generated(together, batch, **options)
    for name, rows in rows_of(MIXTURE).items():
        own = generated(alone[name], part(batch, rows), **options)
        rows = [per_row * i + k for i in rows for k in range(per_row)]
        length = own.shape[1]  # the longest of these rows; those of other methods may go on
        assert torch.equal(found[rows, :length], own), name
        assert (found[rows, length:] == PAD).all()


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("architecture", ["bart", "t5", "llama", "gpt2", "opt"])
def test_generation_gives_each_row_the_tokens_of_its_method(architecture, padding):
    alone, together = made(architecture)
    batch = inputs(together, batch=7, padding=padding)
    assert_generates_alone(alone, together, batch)
    assert_generates_alone(alone, together, batch, use_cache=False)
    assert_generates_alone(alone, together, batch, 2, num_beams=3, num_return_sequences=2)


@pytest.mark.parametrize("architecture", ["bart", "llama"])
def test_generation_in_which_rows_end(architecture):
    alone, together = made(architecture)
    batch = inputs(together, batch=7)
    with pelt_fast.route(together, MIXTURE):
        new = generated(together, batch)[:, -6:]
    ending = {token: (new == token).any(1).sum() for token in new[:, 1:-1].unique().tolist()}
    eos = next(token for token, rows in ending.items() if rows in range(1, 7))
    assert_generates_alone(alone, together, batch, eos_token_id=eos)
    assert_generates_alone(alone, together, batch, eos_token_id=eos, num_beams=2)


def in_pieces(model, ids, mask, cuts, names, **given):
    """The logits of one forward for each piece, and the cache."""
    found, start, cache = [], 0, None
    for end in (*cuts, ids.shape[1]):
        seen = None if mask is None else mask[:, :end]
        more = {name: value[:, start:end] for name, value in given.items()}
        with pelt_fast.route(model, names):
            out = model(ids[:, start:end], attention_mask=seen, cache=cache, use_cache=True, **more)
        found, cache, start = [*found, out.logits], out.cache, end
    return torch.cat(found, 1), cache


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "opt", "bert"])
def test_pieces_with_a_cache_are_the_whole_without(architecture, padding):
    alone, together = ready(decoder(architecture))
    batch = inputs(together, batch=7, padding=padding)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    seen = torch.ones_like(ids).bool() if mask is None else mask.bool()
    given = [{}]
    if padding is None:
        given.append(dict(position_ids=torch.arange(T).expand(7, -1) + 3))
    for more in given:
        expected = torch.empty(7, T, 61, dtype=torch.float64)
        for name, rows in rows_of(MIXTURE).items():
            own = dict(part(more, rows), attention_mask=None if mask is None else mask[rows])
            expected[rows] = alone[name](ids[rows], use_cache=False, **own).logits.detach()
        for cuts in ([5], range(1, T)):
            for shown in (mask, seen.long()):
                logits, cache = in_pieces(together, ids, shown, cuts, MIXTURE, **more)
                assert torch.allclose(logits[seen], expected[seen], rtol=0, atol=1e-12)
                assert cache.get_seq_length() == T
                assert cache.layers[0].get_seq_length() == T + 7


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_rows_are_reordered_repeated_and_dropped_with_their_methods(architecture):
    _, together = made(architecture)
    together.requires_grad_(False)
    ids = inputs(together, batch=4)["input_ids"]
    names = ["seven", "one", None, "lora"]
    with pelt_fast.route(together, names):
        whole = together(ids, use_cache=False).logits[:, 5:]
    _, filled = in_pieces(together, ids[:, :5], None, [], names)
    for copied in (copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))):
        for kept in ([2, 0, 3, 1], [1, 3], [3, 2], [1], [2]):
            cache = copied(filled)
            change = cache.reorder_cache if len(kept) == 4 else cache.batch_select_indices
            change(torch.tensor(kept))
            with pelt_fast.route(together, [names[i] for i in kept]):
                out = together(ids[kept, 5:], cache=cache)
            assert torch.allclose(out.logits, whole[kept], rtol=0, atol=1e-12)
    filled.batch_repeat_interleave(2)
    again = ids.repeat_interleave(2, 0)[:, 5:]
    with pelt_fast.route(together, names):
        out = together(again, cache=filled).logits
    assert torch.allclose(out, whole.repeat_interleave(2, 0), rtol=0, atol=1e-12)


def test_caches_of_other_routes_and_prompts_are_refused():
    _, together = made("llama")
    together.requires_grad_(False)
    ids = inputs(together, batch=3)["input_ids"]
    names = ["seven", None, "one"]

    def refused(filled, now, match):
        _, cache = in_pieces(together, ids[:, :5], None, [], filled)
        with pelt_fast.route(together, now), pytest.raises(ValueError, match=match):
            together(ids[:, 5:], cache=cache)

    refused(names, ["one", None, "seven"], "other routes")
    refused(names, ["seven", "lora", "one"], "other routes")
    refused(names, ["seven"] * 3, "other routes")
    refused(names, [None] * 3, "other routes")
    refused(["seven"] * 3, names, "other routes")
    refused(["seven"] * 3, ["one"] * 3, "another prompt of 7")
    refused(["lora", None, "mam"], names, "no mark of a prompt")
    _, cache = in_pieces(together, ids[:, :5], None, [], names)
    parameters_of_method(together, "three")["model.pelt_prompt.embedding"].data.add_(1)
    with pelt_fast.route(together, names):
        together(ids[:, 5:6], cache=cache)  # no row is under that method
        parameters_of_method(together, "one")["model.pelt_prompt.embedding"].data.add_(1)
        with pytest.raises(ValueError, match="this one before it changed"):
            together(ids[:, 6:], cache=cache)
        cache.reset()
        assert torch.equal(together(ids, cache=cache).logits, together(ids).logits)
    with pelt_fast.route(together, "lora"):
        cache.reset()
        assert torch.equal(together(ids, cache=cache).logits, together(ids).logits)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_encoder_outputs_of_the_caller_s(architecture, padding):
    _, together = made(architecture)
    batch = inputs(together.requires_grad_(False), batch=7, padding=padding)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    with pelt_fast.route(together, MIXTURE):
        whole = together(ids, attention_mask=mask, decoder_input_ids=ids, use_cache=False).logits
        states = together.get_encoder()(ids, attention_mask=mask)
        out = together(encoder_outputs=states, attention_mask=mask, decoder_input_ids=ids[:, :5],
                       use_cache=True)  # fmt: skip
    assert torch.allclose(out.logits, whole[:, :5], rtol=0, atol=1e-12)
    for kept in (list(range(7)), [0, 2], [2, 6], [1, 3]):
        cache, rest = copy.deepcopy(out.cache), [MIXTURE[i] for i in kept]
        cache.batch_select_indices(torch.tensor(kept))
        given = dict(encoder_outputs=(states[0][kept],), decoder_input_ids=ids[kept, 5:])
        given["attention_mask"] = torch.ones_like(ids)[kept] if mask is None else mask[kept]
        with pelt_fast.route(together, rest):
            found = together(**given, cache=cache).logits
            anew = together(**dict(given, decoder_input_ids=ids[kept])).logits
        assert torch.allclose(found, whole[kept, 5:], rtol=0, atol=1e-12)
        assert torch.allclose(anew, whole[kept], rtol=0, atol=1e-12)


def test_cross_keys_of_other_routes_are_refused():
    _, together = made("t5")
    ids = inputs(together, batch=3)["input_ids"]
    cache = None
    for names in (["seven", None, "one"], ["one", None, "seven"]):
        with pelt_fast.route(together, names):
            states = together.get_encoder()(ids)
            given = dict(encoder_outputs=states, decoder_input_ids=ids[:, :2])
            if cache is None:
                cache = together(**given, use_cache=True).cache
                cache.reset()  # a cache that the caller hands in
                together(**given, cache=cache)
                continue
            with pytest.raises(ValueError, match="filled under other routes"):
                together(**given, cache=cache)


def test_encoder_outputs_of_other_routes_are_refused():
    _, together = made("bart")
    ids = inputs(together, batch=2)["input_ids"]
    with pelt_fast.route(together, ["one", "three"]):
        states = together.get_encoder()(ids)
    given = dict(encoder_outputs=states, attention_mask=torch.ones_like(ids))
    message = "have 3 virtual tokens in front, and a row's prompt has 7"
    with pelt_fast.route(together, ["seven", None]), pytest.raises(ValueError, match=message):
        together(**given, decoder_input_ids=ids)
