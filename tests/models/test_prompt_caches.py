"""A prompt and a cache: any way of handing tokens in piece by piece gives what one forward without
a cache gives, judged in fp64 with the prompt put in front by hand, or it is refused."""

import copy
import pickle

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    QuantizedCache,
    StaticCache,
)

import pelt_fast
from pelt_fast.layouts.lookup import base_of
from tests.models.test_parity import small_method
from tests.models.test_prompt import P, by_embeddings, close, front, prompt_of, prompted
from tests.small import MODELS, MORE, PAD, inputs, llama, randomise

ROTARY = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"]
LEARNED = ["opt", "gpt2"]
SUMMED = ["bert", "roberta", "electra", "xlm-roberta"]  # their encoders made decoders
DECODERS = [*ROTARY, *LEARNED, *SUMMED]
ALL = {**MODELS, **MORE}
T = 9
# transformers takes the softmax of Gemma 2's eager attention in fp32
APART = {"gemma2": 1e-7}


def decoder(architecture, **changes):
    """A maker of a small causal language model."""
    if architecture not in SUMMED:
        return lambda dropout: ALL[architecture](dropout=dropout, **changes)

    def make(dropout):
        config = ALL[architecture](dropout=dropout, is_decoder=True, **changes).config
        return AutoModelForCausalLM.from_config(config)

    return make


def ready(architecture, **changes):
    torch.manual_seed(0)
    plain, model = prompted(decoder(architecture, **changes))
    trained = model.state_dict()  # a head trains too
    plain.load_state_dict({name: trained[name] for name in plain.state_dict()})
    for each in (plain, model):
        each.generation_config.eos_token_id = None
    return plain, model.requires_grad_(False)


def by_hand(plain, prompt, ids, mask):
    """Logits of the bare model with the prompt in front of its embeddings, without a cache."""
    kind = plain.config.model_type
    rows = prompt.expand(ids.shape[0], -1, -1)
    if kind in SUMMED:
        norm = base_of(plain).embeddings.LayerNorm
        hook = norm.register_forward_pre_hook(lambda _, args: torch.cat([rows, args[0]], 1))
        logits = plain(ids, attention_mask=front(mask), use_cache=False).logits[:, P:]
        hook.remove()
        return logits
    if kind in LEARNED:
        batch = dict(input_ids=ids, attention_mask=mask)
        return plain.lm_head(by_embeddings(plain, prompt, batch))
    x = torch.cat([rows, plain.get_input_embeddings()(ids)], 1)
    return plain(inputs_embeds=x, attention_mask=front(mask), use_cache=False).logits[:, P:]


def in_pieces(model, ids, mask, cuts, cache=None, **given):
    """Logits of one forward for each piece."""
    found, start = [], 0
    for end in (*cuts, ids.shape[1]):
        seen = None if mask is None else mask[:, :end]
        options = {name: value[:, start:end] for name, value in given.items()}
        out = model(ids[:, start:end], attention_mask=seen, cache=cache, use_cache=True, **options)
        found, cache, start = [*found, out.logits], out.cache, end
    return torch.cat(found, 1), cache


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_pieces_with_a_cache_are_the_whole_without(architecture, padding):
    plain, model = ready(architecture)
    if padding == "left" and "roberta" in architecture:
        pytest.skip("RoBERTa itself counts a row's padding among the positions of what is cached")
    batch = inputs(model, padding=padding)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    seen = torch.ones_like(ids) if mask is None else mask
    expected = by_hand(plain, prompt_of(model), ids, seen)
    seen = seen.bool()
    for cuts in ([5], [4, 5, 6], range(1, T)):
        for given in (mask, seen.long()):
            logits, cache = in_pieces(model, ids, given, cuts)
            apart = APART.get(architecture, 1e-12)
            assert close(logits[seen], expected[seen], apart), (cuts, given is None)
            assert cache.get_seq_length() == T
            assert cache.layers[0].get_seq_length() == P + T


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bert"])
def test_positions_of_the_caller_s_and_caches_of_the_caller_s(architecture):
    _, model = ready(architecture)
    ids = inputs(model)["input_ids"]
    positions = torch.arange(T).expand(3, -1) + 3
    whole = model(ids, position_ids=positions, use_cache=False).logits
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        logits, _ = in_pieces(model, ids, None, [4, 6], cache, position_ids=positions)
        assert close(logits, whole)


KW = dict(do_sample=False, output_logits=True, return_dict_in_generate=True, max_new_tokens=4,
          pad_token_id=PAD)  # fmt: skip


def counted(length):
    """The positions that generate hands in; RoBERTa alone begins elsewhere when it has none."""
    return dict(position_ids=torch.arange(length).expand(3, -1))


def assert_generated(model, out, start):
    """The logits of every generated token against one forward without a cache. Those that generate
    returns are fp32."""
    ids, new = out.sequences, torch.stack(out.logits, 1)
    assert ids.shape[1] == start + new.shape[1]
    whole = model(ids, **counted(ids.shape[1]), use_cache=False).logits[:, start - 1 : -1]
    assert torch.equal(whole.argmax(-1), ids[:, start:])
    assert close(new, whole.float(), 1e-5)


@pytest.mark.parametrize("length", [T, 14])
@pytest.mark.parametrize("architecture", DECODERS)
def test_generate_goes_on_where_a_filled_cache_ends(architecture, length):
    _, model = ready(architecture)
    ids = inputs(model, length=length)["input_ids"]
    kept = DynamicCache(config=model.config)
    model(ids[:, :5], **counted(5), cache=kept, use_cache=True)
    for again in (copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))):
        out = model.generate(ids, cache=again(kept), **KW)
        assert kept.get_seq_length() == 5 and out.cache.get_seq_length() == length + 3
        assert_generated(model, out, length)
    ids = torch.cat([out.sequences, ids[:, :3]], 1)  # a second turn on the cache of the first
    assert_generated(model, model.generate(ids, cache=out.cache, **KW), ids.shape[1])


@pytest.mark.parametrize("architecture", ["llama", "opt", "bert"])
def test_a_cache_is_cropped_reordered_repeated_and_reset(architecture):
    _, model = ready(architecture)
    ids = inputs(model)["input_ids"]
    whole = model(ids, use_cache=False).logits
    _, cache = in_pieces(model, ids, None, [5])
    cache.crop(-4)
    assert close(model(ids[:, 5:], cache=cache).logits, whole[:, 5:])
    cache.crop(-T)
    assert cache.get_seq_length() == 0 and cache.layers[0].get_seq_length() == P
    assert close(model(ids, cache=cache).logits, whole)
    cache.crop(-3)
    order = torch.tensor([2, 0, 1])
    cache.reorder_cache(order)
    assert close(model(ids[order, 6:], cache=cache).logits, whole[order, 6:])
    cache.reset()
    assert close(model(ids, cache=cache).logits, whole)
    _, cache = in_pieces(model, ids[:1, :5], None, [])
    cache.batch_repeat_interleave(3)
    same = torch.cat([ids[:1, :5].expand(3, -1), ids[:, 5:]], 1)
    assert close(model(same[:, 5:], cache=cache).logits, model(same).logits[:, 5:])


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt2", "bert"])
def test_every_decoding_gives_the_tokens_of_no_cache(architecture, padding):
    _, model = ready(architecture)
    batch = inputs(model, padding=padding)
    given = {name: value for name, value in batch.items() if name != "labels"}
    mask = given.get("attention_mask")
    options = dict(KW, max_new_tokens=5, output_logits=False, return_dict_in_generate=False)
    plain = model.generate(**given, use_cache=False, **options)
    beams = model.generate(**given, use_cache=False, num_beams=3, num_return_sequences=2, **options)
    found = model.generate(**given, num_beams=3, num_return_sequences=2, **options)
    assert torch.equal(found, beams)
    for more in ({}, dict(prefill_chunk_size=4)):
        assert torch.equal(model.generate(**given, **more, **options), plain), more
    cache = DynamicCache(config=model.config)
    model(given["input_ids"][:, :3], attention_mask=None if mask is None else mask[:, :3],
          cache=cache, use_cache=True)  # fmt: skip
    chunked = model.generate(**given, cache=cache, prefill_chunk_size=2, **options)
    assert torch.equal(chunked, plain)
    if architecture in SUMMED:
        return
    embeds = model.get_input_embeddings()(given["input_ids"])
    by_embeds = model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    assert torch.equal(by_embeds, plain[:, T:])
    one = {name: value[:1] for name, value in given.items()}
    for more in (dict(assistant_model=copy.deepcopy(model)), dict(prompt_lookup_num_tokens=2)):
        assert torch.equal(model.generate(**one, **more, **options), plain[:1]), list(more)


@pytest.mark.parametrize("architecture", ["llama", "opt", "bert"])
def test_keys_that_the_prompt_did_not_make_are_refused(architecture):
    plain, model = ready(architecture)
    ids = inputs(model)["input_ids"]

    def filled(by, length=5):
        return by(ids[:, :length], use_cache=True).cache

    def refused(cache, match, by=model):
        with pytest.raises(ValueError, match=match):
            by(ids[:, 5:], cache=cache)
        with pytest.raises(ValueError, match=match):
            by.generate(ids, cache=cache, **KW)

    refused(filled(plain), "holds 5 keys and no mark of a prompt")
    refused(EncoderDecoderCache(filled(plain), DynamicCache()), "no mark of a prompt")
    anew = DynamicCache([(layer.keys, layer.values) for layer in filled(model).layers])
    refused(anew, f"holds {P + 5} keys and no mark")
    refused(StaticCache(model.config, max_cache_len=32), "a static cache has no place for the 5")
    refused(filled(model), "the model that runs now does not carry", plain)
    cropped = filled(model)
    cropped.crop(-7)
    refused(cropped, "cropped to 3 keys, into the 5 virtual")
    others = filled(model)
    prompt_of(model).data.add_(1e-3)  # trained, past autograd's count
    refused(others, "another prompt of 5 virtual tokens, or with this one before it changed")
    gone = filled(model)
    refused(gone, "does not carry", pelt_fast.eject(model))


def test_a_cache_of_before_activate_is_refused_after_it():
    model = llama()
    methods = {name: small_method("prompt") for name in ("one", "two")}
    pelt_fast.inject_named(model, methods).eval()
    ids = inputs(model)["input_ids"]
    cache = model(ids[:, :5], use_cache=True).cache
    pelt_fast.set_active(model, "two")
    with pytest.raises(ValueError, match="another prompt"):
        model(ids[:, 5:], cache=cache)
    pelt_fast.set_active(model, "one")
    assert close(model(ids[:, 5:], cache=cache).logits, model(ids).logits[:, 5:], 1e-5)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_forward_that_breaks_off_leaves_nothing_behind(architecture):
    _, model = ready(architecture)
    ids = inputs(model)["input_ids"]
    whole = model(ids).logits
    cache = model(ids[:, :5], use_cache=True).cache
    broken = copy.deepcopy(cache)
    layers = [m for n, m in model.named_modules() if n.endswith(".1") and "layer" in n]

    def fail(*_):
        raise RuntimeError("broken off")

    hook = layers[0].register_forward_pre_hook(fail)
    for given in (dict(cache=broken), {}):
        with pytest.raises(RuntimeError, match="broken off"):
            model(ids[:, 5:], **given)
    hook.remove()
    with pytest.raises(ValueError, match="left it half written"):
        model(ids[:, 5:], cache=broken)
    assert close(model(ids).logits, whole)
    with pytest.raises(ValueError, match="attention_mask of shape"):
        model(ids[:, 5:], cache=cache, attention_mask=torch.ones(3, 1, 4, T))
    assert cache.get_seq_length() == 5
    assert close(model(ids[:, 5:], cache=cache).logits, whole[:, 5:])


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_cross_attention_of_a_decoder(architecture):
    _, model = ready(architecture, add_cross_attention=True)
    ids, states = inputs(model)["input_ids"], torch.randn(3, 6, 32).double()
    whole = model(ids, encoder_hidden_states=states, use_cache=False).logits
    cache, found = None, []
    for start, end in [(0, 4), (4, 5), (5, T)]:
        out = model(ids[:, start:end], encoder_hidden_states=states, cache=cache, use_cache=True)
        cache, found = out.cache, [*found, out.logits]
    assert close(torch.cat(found, 1), whole)
    assert isinstance(cache, EncoderDecoderCache) and cache.get_seq_length() == T
    out = copy.deepcopy(cache)
    out.crop(-3)
    again = model(ids[:, 6:], encoder_hidden_states=states, cache=out).logits
    assert close(again, whole[:, 6:])


@pytest.mark.parametrize("method", ["prefix", "mam"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt", "gpt2"])
def test_second_turns_under_a_prefix_which_no_cache_holds(architecture, method):
    torch.manual_seed(0)
    model = pelt_fast.inject(decoder(architecture)(0.0), small_method(method))
    model = randomise(model, 0.5).eval().double().requires_grad_(False)
    model.generation_config.eos_token_id = None
    ids = inputs(model, length=14)["input_ids"]
    whole = model(ids, use_cache=False).logits
    logits, cache = in_pieces(model, ids, None, [5, 6, 9])
    assert close(logits, whole, 1e-9) and cache.get_seq_length() == 14
    cache.crop(-4) if architecture != "mistral" else None
    out = model.generate(ids, cache=None if architecture == "mistral" else cache, **KW)
    assert_generated(model, out, 14)
    ids = torch.cat([out.sequences, ids[:, :3]], 1)
    assert_generated(model, model.generate(ids, cache=out.cache, **KW), ids.shape[1])


def test_second_turns_of_an_accelerated_peft_prefix_and_none_on_peft_s_caches():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = llama()
    base.generation_config.eos_token_id = None
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    own = randomise(peft.get_peft_model(base, config), 0.5).eval().double()
    ids = inputs(base, length=14)["input_ids"]
    theirs = own(ids[:, :5]).cache
    model = pelt_fast.accelerate_peft(own).requires_grad_(False)
    logits, cache = in_pieces(model, ids, None, [5, 6, 9])
    assert close(logits, model(ids, use_cache=False).logits)
    cache.crop(-3)
    for known in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert_generated(model, model.generate(input_ids=ids, cache=known, **KW), 14)
    with pytest.raises(ValueError, match="holds 9 keys that the accelerated PEFT model did not"):
        model(ids[:, 5:], cache=theirs)
    with pytest.raises(ValueError, match="holds 9 keys that the accelerated PEFT model did not"):
        model.generate(input_ids=ids, cache=theirs, **KW)


def test_a_quantised_cache_counts_its_tokens_alone():
    pytest.importorskip("optimum.quanto")
    _, model = ready("llama")
    ids = inputs(model)["input_ids"]
    out = model(ids, cache=QuantizedCache("quanto", model.config), use_cache=True)
    assert out.cache.get_seq_length() == T
