"""What a prompt keeps of one call, what it reads when it runs, and what comes back aligned."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.func import functional_call
from transformers import BertForTokenClassification
from transformers.modeling_outputs import BaseModelOutput

import pelt_fast
from pelt_fast.layouts.lookup import base_of
from tests.models.test_parity import small_method
from tests.models.test_prompt import P, close, prompted
from tests.small import MODELS, MORE, bert, inputs, llama, outputs_and_gradients, randomise

ALL = {**MODELS, **MORE}
EVERY = [name for name in ALL if name != "t5, gated"]


def wide(batch):
    return {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}


def logits(model, batch):
    found = {name: value for name, value in batch.items() if name != "labels"}
    if model.config.is_encoder_decoder and "decoder_input_ids" not in found:
        found["decoder_input_ids"] = found["input_ids"]
    return model(**found).logits


@pytest.mark.parametrize("architecture", EVERY)
def test_four_threads_run_one_model(architecture):
    _, model = prompted(ALL[architecture])
    length = [9] * 6 if architecture == "vit" else [5, 7, 9, 11, 6, 8]
    batches = [wide(inputs(model, length=n)) for n in length]
    with torch.no_grad():
        expected = [logits(model, batch) for batch in batches]

    @torch.no_grad()
    def job(index):
        return close(logits(model, batches[index % 6]), expected[index % 6])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(job, range(24)))


def test_threads_with_a_cache_of_their_own():
    _, model = prompted(llama)
    batches = [inputs(model, length=n)["input_ids"] for n in (5, 7, 9, 11)]
    expected = [model(ids, use_cache=False).logits for ids in batches]

    @torch.no_grad()
    def job(index):
        ids, cache, found = batches[index % 4], None, []
        for one in ids.split(1, 1):
            out = model(one, cache=cache, use_cache=True)
            cache, found = out.cache, [*found, out.logits]
        return close(torch.cat(found, 1), expected[index % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(job, range(12)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "bart", "vit"])
def test_two_weight_sets_and_lengths_in_one_backward(architecture):
    _, model = prompted(ALL[architecture])
    batches = [wide(inputs(model, length=n)) for n in (9, 9 if architecture == "vit" else 6)]
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sets = [{n: (s * p).detach().requires_grad_() for n, p in own.items()} for s in (1.0, 0.5)]

    def loss(values, batch):
        return functional_call(model, values, (), batch).loss

    both = sum(loss(values, batch) for values, batch in zip(sets, batches))
    found = [torch.autograd.grad(both, list(v.values()), retain_graph=True) for v in sets]
    for values, batch, grads in zip(sets, batches, found):
        alone = torch.autograd.grad(loss(values, batch), list(values.values()))
        assert all(close(a, b) for a, b in zip(grads, alone))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("architecture", EVERY)
def test_both_kinds_of_checkpointing_give_the_gradients(architecture, reentrant):
    _, model = prompted(ALL[architecture])
    batch = wide(inputs(model))
    model.train()
    _, expected = outputs_and_gradients(model, batch)
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    if reentrant and hasattr(model, "enable_input_require_grads") and architecture != "vit":
        model.enable_input_require_grads()
    _, found = outputs_and_gradients(model, batch)
    assert found.keys() >= expected.keys()
    assert all(close(found[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("architecture", ["llama", "opt", "bert", "bart", "vit"])
def test_a_copy_reads_its_own_prompt_and_embeddings(architecture, again):
    _, model = prompted(ALL[architecture])
    batch = wide(inputs(model))
    expected, other = logits(model, batch), again(model)
    assert close(logits(other, batch), expected)
    randomise(other, 1.0)
    if architecture != "vit":
        other.get_input_embeddings().weight.data.mul_(3)
    assert close(logits(model, batch), expected) and not close(logits(other, batch), expected)


TOKENS = [name for name in EVERY if name not in ("vit", "whisper")]


@pytest.mark.parametrize("architecture", TOKENS)
def test_hooks_on_the_input_embeddings_act(architecture):
    """As NEFTune's does."""
    _, model = prompted(ALL[architecture])
    # an encoder's own may be another module than the model's, which runs neither
    owner = model.get_encoder() if model.config.is_encoder_decoder else model
    embeddings = owner.get_input_embeddings()
    noise = torch.linspace(-1, 1, embeddings.weight.shape[1]).double()
    batch = inputs(model)
    before = logits(model, batch)
    hook = embeddings.register_forward_hook(lambda module, args, out: out + noise)
    hooked = logits(model, batch)
    hook.remove()
    given = batch["input_ids"]
    embeds = embeddings(given) + noise
    decoder = dict(decoder_input_ids=given) if model.config.is_encoder_decoder else {}
    by_embeds = model(inputs_embeds=embeds, **decoder).logits
    assert not close(hooked, before, 1e-3)
    if not model.config.is_encoder_decoder:  # whose decoder may share it
        assert close(hooked, by_embeds)


@pytest.mark.parametrize("architecture", TOKENS)
def test_embeddings_set_or_resized_after_inject_are_used(architecture):
    plain, model = prompted(ALL[architecture])
    for changed in (plain, model):
        torch.manual_seed(0)
        changed.resize_token_embeddings(90, mean_resizing=False)
        old = changed.get_input_embeddings()
        new = copy.deepcopy(old)
        torch.manual_seed(1)
        new.weight.data = torch.randn_like(new.weight)
        changed.set_input_embeddings(new)
    again = pelt_fast.inject(plain, small_method("prompt")).eval()
    copied = {n: p for n, p in model.state_dict().items() if "pelt_" in n or n in again._pelt.head}
    again.load_state_dict(copied, strict=False)
    batch = inputs(model)
    batch["input_ids"] = batch["input_ids"] + 29
    assert batch["input_ids"].max() >= 61
    assert close(logits(model, batch), logits(again, batch))


@pytest.mark.parametrize("architecture, path", [
    ("gpt2", "transformer.wpe"), ("opt", "model.decoder.embed_positions"),
    ("bart", "model.encoder.embed_positions"), ("bert", "bert.embeddings.LayerNorm"),
])  # fmt: skip
def test_what_was_replaced_is_noticed(architecture, path):
    _, model = prompted(ALL[architecture])
    parent, _, name = path.rpartition(".")
    old = model.get_submodule(path)
    new = copy.deepcopy(old)
    new.__dict__.pop("forward", None)
    new._forward_pre_hooks.clear()
    setattr(model.get_submodule(parent), name, new)
    with pytest.raises(RuntimeError, match=rf"{name} is .* now, not the"):
        model(**inputs(model))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("architecture", [*MODELS, "gpt2", "opt", "gemma2", "modernbert", "mixtral",
                                          "electra", "deberta-v2", "vit"])  # fmt: skip
def test_what_comes_back_has_the_tokens_places(architecture, named):
    _, model = prompted(lambda dropout: ALL[architecture](dropout=dropout))
    model.set_attn_implementation("eager")
    batch = wide(inputs(model))
    batch.pop("labels")
    more = dict(output_router_logits=True) if architecture == "mixtral" else {}
    base = base_of(model)
    out = base(**batch, output_hidden_states=True, output_attentions=True, **more)
    tokens = 10 if architecture == "vit" else 9  # patches and [CLS]
    if model.config.is_encoder_decoder:
        assert out.encoder_last_hidden_state.shape[1] == P + tokens
        assert all(a.shape[2:] == (tokens, P + tokens) for a in out.cross_attentions)
        states, attentions = out.decoder_hidden_states, ()
    else:
        states, attentions = out.hidden_states, out.attentions
        assert close(states[-1], out.last_hidden_state) or architecture in ("vit",)
    assert len(states) >= 3 and all(h.shape[1] == tokens for h in states)
    assert all(a.shape[2:] == (tokens, P + tokens) for a in attentions)
    assert all(len(r) == 3 * tokens for r in out.get("router_logits") or ())
    if not named:
        plain = base(**batch, output_hidden_states=True, output_attentions=True, return_dict=False)
        assert close(plain[0], out[0])
        for one in plain[1:]:
            if isinstance(one, tuple) and one and isinstance(one[0], torch.Tensor):
                assert all(each.shape[-2] in (tokens, P + tokens) for each in one)
                if one[0].dim() == 3 and not model.config.is_encoder_decoder:
                    assert all(close(a, b) for a, b in zip(one, states))


def test_labels_and_logits_to_keep():
    _, model = prompted(llama)
    ids = inputs(model)["input_ids"]
    whole = model(ids).logits
    assert close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    kept = torch.tensor([0, 4])
    assert close(model(ids, logits_to_keep=kept).logits, whole[:, kept])
    _, model = prompted(lambda dropout: bert(BertForTokenClassification, dropout))
    found = model(ids, labels=ids % 3, return_dict=False)
    assert close(found[0], model(ids, labels=ids % 3).loss) and found[1].shape == (3, 9, 3)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("architecture", ["bart", "mbart", "t5", "mt5", "whisper"])
def test_encoder_outputs_of_the_caller_s(architecture, padding):
    if (architecture, padding) == ("whisper", "left"):
        pytest.skip("audio has no padding")
    _, model = prompted(ALL[architecture])
    batch = wide(inputs(model, padding=None if architecture == "whisper" else padding))
    batch.pop("labels")
    ids = batch.pop("decoder_input_ids", batch.get("input_ids"))
    whole = model(**batch, decoder_input_ids=ids, use_cache=False).logits
    mask = {name: t for name, t in batch.items() if name == "attention_mask"}
    states = model.get_encoder()(**batch)
    for given in (states, (states[0],), BaseModelOutput(states[0])):
        cache, found = None, []
        for start, end in [(0, 4), (4, 5), (5, 9)]:
            out = model(encoder_outputs=given, decoder_input_ids=ids[:, start:end], cache=cache,
                        use_cache=True, **mask)  # fmt: skip
            cache, found = out.cache, [*found, out.logits]
        assert close(torch.cat(found, 1), whole)
    embeds = model.get_decoder().get_input_embeddings()(ids)
    assert close(model(**batch, decoder_inputs_embeds=embeds).logits, whole)
    options = dict(do_sample=False, max_new_tokens=4, min_new_tokens=4)
    main = {name: t for name, t in batch.items() if name != "attention_mask"}
    expected = model.generate(**main, **mask, use_cache=False, **options)
    main = main if architecture == "whisper" else {}  # it always asks for its audio
    for more in ({}, dict(num_beams=1)):
        found = model.generate(**main, encoder_outputs=states, **mask, **options, **more)
        assert torch.equal(found, expected)


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("architecture", ["llama", "opt", "bert", "bart"])
def test_one_graph_under_compile_and_a_cache_that_comes_out_of_it(architecture):
    _, model = prompted(ALL[architecture])
    model.requires_grad_(False)
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    batch = {name: t for name, t in inputs(model).items() if name != "labels"}
    out = compiled(**batch)
    assert close(out.logits, model(**batch).logits) and len(graphs) == 1
    if architecture in ("llama", "opt"):
        ids = inputs(model, length=4)["input_ids"]
        whole = model(torch.cat([batch["input_ids"], ids], 1), use_cache=False).logits
        assert out.cache.get_seq_length() == 9
        assert close(model(ids, cache=out.cache).logits, whole[:, 9:])


@pytest.mark.parametrize("architecture", ["bart", "mbart", "t5", "mt5"])
def test_a_decoder_s_cache_of_an_encoder_without_the_prompt_is_refused(architecture):
    plain, model = prompted(ALL[architecture])
    batch = wide(inputs(model))
    batch.pop("labels")
    ids = batch.pop("decoder_input_ids", batch.get("input_ids"))
    cache = plain(**batch, decoder_input_ids=ids[:, :4], use_cache=True).cache
    with pytest.raises(ValueError, match="keys of an encoder that returned"):
        model(**batch, decoder_input_ids=ids[:, 4:], cache=cache)
