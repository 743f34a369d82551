"""Prompt tuning against concatenation by hand: masks, positions, labels, pooling, the cache."""

import copy

import pytest
import torch
from transformers import BertForTokenClassification, LlamaForSequenceClassification

import pelt_fast
from pelt_fast.layouts.lookup import base_of
from tests.models.test_generate import tokens
from tests.models.test_parity import PADDINGS, outputs_and_gradients, small_method
from tests.small import MODELS, MORE, PAD, bert, inputs, llama, randomise

P = 5
ENCODERS = ["bert", "roberta"]


def prompted(make, **changes):
    """A model and the same under a prompt, in fp64: both ways are one number there."""
    plain = make(dropout=0.0, **changes).eval().double()
    model = pelt_fast.inject(copy.deepcopy(plain), small_method("prompt")).eval()
    return plain, randomise(model, 1.0)


def close(actual, expected, apart=1e-12):
    return torch.allclose(actual, expected, rtol=0, atol=apart)


def prompt_of(model):
    (prompt,) = [m for n, m in model.named_modules() if n.endswith("pelt_prompt")]
    return prompt.embedding


def front(mask):
    return torch.cat([mask.new_ones(mask.shape[0], P), mask], 1)


def additive(mask):
    """What a layer of an fp64 model takes: torch's CPU flash kernel misreads a mask of another
    dtype than the queries' (docs/facts.md)."""
    hidden = torch.zeros(mask.shape, dtype=torch.float64).masked_fill_(mask == 0, -torch.inf)
    return hidden[:, None, None]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("architecture", ENCODERS)
def test_encoder_pools_the_first_token_and_gives_the_prompt_no_position(architecture, padding):
    plain, model = prompted(MODELS[architecture])
    batch = inputs(model, padding=padding)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    base = base_of(plain)
    summed = {}
    hook = base.embeddings.LayerNorm.register_forward_pre_hook(lambda m, a: summed.update(x=a[0]))
    base(batch["input_ids"], attention_mask=mask)
    hook.remove()
    prompt = prompt_of(model).expand(mask.shape[0], -1, -1)
    hidden = base.embeddings.LayerNorm(torch.cat([prompt, summed["x"]], 1))
    wide = additive(front(mask))
    for layer in base.encoder.layer:
        hidden = layer(hidden, wide)
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    out = base_of(model)(batch["input_ids"], attention_mask=batch.get("attention_mask"),
                         output_hidden_states=True)  # fmt: skip
    assert close(out.last_hidden_state, hidden[:, P:])
    assert all(h.shape[1] == mask.shape[1] for h in out.hidden_states)
    if architecture == "bert":
        assert close(out.pooler_output, base.pooler(hidden[:, P:]))
    model(**batch).loss.backward()
    assert prompt_of(model).grad.abs().sum() > 0


def test_token_outputs_stay_aligned_with_their_labels():
    plain, model = prompted(lambda dropout, **c: bert(BertForTokenClassification, dropout, **c))
    ids = inputs(plain)["input_ids"]
    out = model(ids, labels=ids % 3)
    assert out.logits.shape == (3, 9, 3)
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), (ids % 3).flatten())
    assert close(out.loss, loss)


@pytest.mark.parametrize("padding", PADDINGS)
def test_decoder_is_the_concatenation_of_embeddings(padding):
    plain, model = prompted(llama)
    batch = inputs(model, padding=padding)
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    embeds = torch.cat([prompt_of(model).expand(3, -1, -1), plain.model.embed_tokens(ids)], 1)
    labels = torch.cat([torch.full((3, P), -100), batch["labels"]], 1)
    wide = plain(inputs_embeds=embeds, attention_mask=front(mask))
    assert close(model(**batch).logits, wide.logits[:, P:])
    # the tokens' own losses: what the last virtual token says of the first token is not among them
    expected = torch.nn.functional.cross_entropy(
        wide.logits[:, P:-1].flatten(0, 1), labels[:, P + 1 :].flatten()
    )
    assert close(model(**batch).loss, expected.float(), 1e-6), (
        "a loss that transformers takes in fp32"
    )
    by_embeds = model(inputs_embeds=plain.model.embed_tokens(ids), attention_mask=mask)
    assert close(by_embeds.logits, model(**batch).logits)


def test_decoder_positions_given_by_the_caller_move_behind_the_prompt():
    plain, model = prompted(llama)
    ids = inputs(model, batch=1)["input_ids"]
    given = torch.arange(9)[None] + 3
    embeds = torch.cat([prompt_of(model)[None], plain.model.embed_tokens(ids)], 1)
    positions = torch.cat([torch.arange(P)[None], given + P], 1)
    # a mask, for transformers takes the gap behind the prompt for a new sequence's beginning
    mask = torch.ones_like(positions)
    expected = plain(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
    expected = expected.logits[:, P:]
    assert close(model(ids, position_ids=given).logits, expected)


def test_decoder_stays_causal():
    _, model = prompted(llama)
    ids = inputs(model)["input_ids"]
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 50 + 4
    moved = (model(ids).logits - model(changed).logits).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [i >= 4 for i in range(ids.shape[1])]


def test_last_token_pooling_of_a_decoder():
    _, model = prompted(lambda dropout, **c: llama(LlamaForSequenceClassification, dropout, **c))
    batch = inputs(model, padding="left")
    whole = base_of(model)(batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert close(logits, model.score(whole.last_hidden_state[:, -1]))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("architecture", ["bart", "mbart"])
def test_encoder_decoder_attends_to_the_prompt_too(architecture, padding):
    plain, model = prompted(MODELS[architecture])
    batch = inputs(model, padding=padding)
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    encoder = plain.model.encoder
    x = encoder.embed_tokens(ids) + encoder.embed_positions(ids)
    x = encoder.layernorm_embedding(torch.cat([prompt_of(model).expand(3, -1, -1), x], 1))
    wide = additive(front(mask))
    for layer in encoder.layers:
        x = layer(x, wide)
    x = encoder.layer_norm(x) if hasattr(encoder, "layer_norm") else x
    expected = plain(
        encoder_outputs=(x,), attention_mask=front(mask), labels=batch["labels"]
    )  # the decoder's own input is the labels, shifted
    out = model(**batch)
    assert close(out.encoder_last_hidden_state, x)
    assert close(out.logits, expected.logits)
    assert close(out.loss, expected.loss)


def by_embeddings(plain, prompt, batch):
    """[prompt; tokens] as inputs_embeds of the plain model, its own positions taken off the prompt
    and those of the tokens moved back in front."""
    base, ids = base_of(plain), batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    wide, kind = front(mask), plain.config.model_type

    def positions(mask):
        if kind == "opt":
            return base.decoder.embed_positions(mask)
        found = torch.arange(mask.shape[1])
        if kind == "gpt2":
            return base.wpe(found)[None]
        return base.embeddings.position_embeddings(found)[None]

    tokens = plain.get_input_embeddings()(ids)
    x = torch.cat([prompt.expand(ids.shape[0], -1, -1), tokens + positions(mask)], 1)
    if kind == "deberta-v2":  # type embeddings, which the model adds to every place
        front_type = base.embeddings.token_type_embeddings
        x[:, :P] -= 0 if front_type is None else front_type.weight[0]
    return base(inputs_embeds=x - positions(wide), attention_mask=wide).last_hidden_state[:, P:]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("architecture", ["opt", "gpt2", "deberta-v2"])
def test_tokens_keep_their_learned_positions(architecture, padding):
    plain, model = prompted(MORE[architecture])
    batch = inputs(model, padding=padding)
    expected = by_embeddings(plain, prompt_of(model), batch)
    given = {name: value for name, value in batch.items() if name != "labels"}
    seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    actual = base_of(model)(**given).last_hidden_state
    assert close(actual[seen], expected[seen])


@pytest.mark.parametrize("padding", PADDINGS)
def test_rotary_encoder_is_the_concatenation_of_embeddings(padding):
    plain, model = prompted(MORE["modernbert"])
    batch = inputs(model, padding=padding)
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    x = torch.cat([prompt_of(model).expand(3, -1, -1), plain.get_input_embeddings()(ids)], 1)
    expected = base_of(plain)(inputs_embeds=x, attention_mask=front(mask)).last_hidden_state
    actual = base_of(model)(ids, attention_mask=batch.get("attention_mask")).last_hidden_state
    assert close(actual[mask.bool()], expected[:, P:][mask.bool()])


def test_patches_and_audio_have_the_prompt_in_front_of_the_first_layer():
    plain, model = prompted(MORE["vit"])
    given = {"pixel_values": inputs(model)["pixel_values"].double()}
    base = base_of(plain)
    x = torch.cat([prompt_of(model).expand(3, -1, -1), base.embeddings(**given)], 1)
    for layer in base.layers:
        x = layer(x, None)
    assert close(base_of(model)(**given).last_hidden_state, base.layernorm(x)[:, P:])

    plain, model = prompted(MORE["whisper"])
    batch = inputs(model)
    batch["input_features"] = batch["input_features"].double()
    encoder = base_of(plain).encoder
    encoder.layers[0].register_forward_pre_hook(
        lambda layer, args: (torch.cat([prompt_of(model).expand(3, -1, -1), args[0]], 1), *args[1:])
    )
    assert close(model(**batch).logits, plain(**batch).logits)
    audio = batch["input_features"]
    assert base_of(model).encoder(audio).last_hidden_state.shape[1] == P + 10


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_generation_with_learned_positions(architecture):
    _, model = prompted(MORE[architecture])
    for padding in (None, "left"):
        batch = inputs(model, padding=padding)
        found = tokens(model, batch, use_cache=False)
        assert torch.equal(tokens(model, batch, use_cache=True), found)


def test_token_types_are_refused_where_the_prompt_has_none():
    _, model = prompted(MORE["gpt2"])
    ids = inputs(model)["input_ids"]
    with pytest.raises(ValueError, match="a prompt has no token_type_ids"):
        model(ids, token_type_ids=ids)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("architecture", ["bart", "mbart", "llama"])
def test_generation_with_and_without_cache(architecture, padding):
    if (architecture, padding) == ("llama", "right"):
        pytest.skip("a decoder is padded left to generate")
    _, model = prompted(MODELS[architecture])
    batch = inputs(model, padding=padding)
    found = tokens(model, batch, use_cache=False)
    assert torch.equal(tokens(model, batch, use_cache=True), found)
    assert tokens(model, batch, num_beams=3).shape == found.shape


def test_left_padding_changes_no_generated_token():
    _, model = prompted(llama)
    ids = inputs(model, batch=1, length=5)["input_ids"]
    padded = torch.cat([torch.full((1, 4), PAD), ids], 1)
    mask = (torch.arange(9) >= 4).long()[None]
    plain = tokens(model, dict(input_ids=ids))[:, 5:]
    assert torch.equal(tokens(model, dict(input_ids=padded, attention_mask=mask))[:, 9:], plain)


def test_what_has_no_place_for_a_prompt_is_refused():
    _, model = prompted(llama)
    batch = inputs(model)
    with pytest.raises(ValueError, match="a static cache has no place for the 5 virtual tokens"):
        tokens(model, batch, cache_implementation="static")
    with pytest.raises(ValueError, match=r"attention_mask of shape \(batch, tokens\), got"):
        model(batch["input_ids"], attention_mask=torch.ones(3, 1, 9, 9))


@pytest.mark.parametrize("architecture", MODELS)
def test_prompt_trains_under_checkpointing_and_on_a_bf16_base(architecture):
    _, model = prompted(MODELS[architecture])
    batch = inputs(model, padding="right")
    _, expected = outputs_and_gradients(model.train(), batch)
    model.gradient_checkpointing_enable()
    _, actual = outputs_and_gradients(model, batch)
    for name, grad in expected.items():
        assert close(actual[name], grad), name
    low = pelt_fast.inject(MODELS[architecture]().bfloat16(), small_method("prompt"))
    low(**inputs(low)).loss.backward()
    assert prompt_of(low).grad.dtype == torch.float32 and prompt_of(low).grad.abs().sum() > 0
