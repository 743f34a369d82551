"""inject and eject: what is frozen, what trains, what comes back, what is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import BartForConditionalGeneration, BioGptConfig, BioGptForCausalLM

import pelt_fast
from pelt_fast.injection.inject import inject
from tests.models.judge import assert_fused_is_the_reference, assert_near
from tests.models.test_parity import JUDGED_SIZE, small_method
from tests.small import MODELS, MORE, bart, inputs, llama, pairs, randomise, roberta

METHODS = [name for name in pelt_fast.methods() if name not in ("linear_probe", "full")]


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def train_a_little(model, steps=2):
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.05)
    batch = inputs(model, padding="right")
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("architecture, method", pairs(METHODS))
def test_eject_gives_the_base_back_bit_for_bit(architecture, method):
    model = MODELS[architecture]()
    model.lm_marker = nn.Parameter(torch.ones(1), requires_grad=False)
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    attention, batch = model.config._attn_implementation, inputs(model, padding="right")
    logits = model.eval()(**batch).logits
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    pelt_fast.inject(model, small_method(method))
    train_a_little(model)
    assert pelt_fast.eject(model) is model
    assert same(snapshot(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.config._attn_implementation == attention
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert after == hooks
    for parameter in model.parameters():  # no weight still looks into a packed buffer
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    assert torch.equal(model.eval()(**batch).logits, logits)
    pelt_fast.inject(model, small_method(method))  # and again


@pytest.mark.parametrize("architecture, method", pairs(METHODS))
def test_state_dict_shows_the_bases_names_beside_the_methods(architecture, method):
    model = MODELS[architecture]()
    before = snapshot(model)
    pelt_fast.inject(model, small_method(method))
    after = model.state_dict()
    assert same({name: after[name] for name in before}, before)
    assert all("pelt_" in name for name in after.keys() - before.keys())
    assert len(after) > len(before) or method == "bitfit"


@pytest.mark.parametrize("architecture, method", pairs([*METHODS, "full"]))
def test_no_trainable_parameter_is_dead_and_the_base_is_frozen(architecture, method):
    """jxhe/unify: 304k dead adapter parameters a RoBERTa, two of three prefix MLPs unused."""
    model = MODELS[architecture]()
    base = {name for name, _ in model.named_parameters()}
    randomise(pelt_fast.inject(model, small_method(method))).train()
    model(**inputs(model, padding="right")).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if method == "full" and ("pooler" in name or "decoder.layer_norm" in name):
                continue
            if method == "bitfit" and name.split(".")[-2] in ("k_proj", "key"):
                continue  # the same for every key: softmax does not see it
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert name in base and parameter.grad is None


@pytest.mark.parametrize("architecture, head", [("roberta", "classifier"), ("bert", "classifier")])
def test_the_task_head_trains(architecture, head):
    """jxhe/unify leaves a classifier at its random init."""
    model = pelt_fast.inject(MODELS[architecture](), small_method("mam_glue"))
    trains = {n for n, p in model.named_parameters() if p.requires_grad and "pelt_" not in n}
    assert trains == {n for n, _ in model.named_parameters() if n.startswith(head)}
    frozen = pelt_fast.PeltConfig("x", small_method("lora").modifications, train_head=False)
    model = pelt_fast.inject(MODELS[architecture](), frozen)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.startswith(head))


def test_a_tied_lm_head_stays_the_bases():
    model = pelt_fast.inject(llama(tie_word_embeddings=True), small_method("lora"))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "pelt_" not in n)


@pytest.mark.parametrize("training", [True, False])
def test_sites_take_the_models_mode(training):
    model = MODELS["bart"]().train(training)
    pelt_fast.inject(model, small_method("mam"))
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("method", ["lora", "lora_ffn", "scaled_parallel_adapter"])
@pytest.mark.parametrize("architecture", MODELS)
def test_lora_init_starts_at_the_base(architecture, method):
    model = MODELS[architecture]().eval()
    batch = inputs(model, padding="left")
    before, exact = model(**batch).logits, copy.deepcopy(model).double()(**batch).logits
    pelt_fast.inject(model, small_method(method))
    assert_near(model(**batch).logits, before, exact)


@torch.no_grad()
def add_one(model):
    for name, parameter in model.named_parameters():
        if "pelt_" in name:
            parameter.add_(1.0)


@pytest.mark.parametrize("method", ["mam", "houlsby", "lora"])
@pytest.mark.parametrize("architecture", MODELS)
def test_copies_and_pickles_are_models_of_their_own(architecture, method):
    model = randomise(pelt_fast.inject(MODELS[architecture](), small_method(method))).eval()
    batch = inputs(model, padding="right")
    model(**batch).loss.backward()  # leaves a prefix that hangs on a graph
    expected = model(**batch).logits
    fresh = pelt_fast.inject(MODELS[architecture](), small_method(method)).eval()
    fresh.load_state_dict(model.state_dict())
    add_one(fresh)
    changed = fresh(**batch).logits
    assert not torch.equal(changed, expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**batch).logits, expected)
        add_one(twin)
        assert torch.equal(twin(**batch).logits, changed)
        pelt_fast.eject(twin)
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("learned", [False, True])
def test_the_out_projection_is_packed_where_no_dropout_follows_it(learned, tmp_path):
    model, config = MODELS["llama"](), small_method("scaled_parallel_adapter", JUDGED_SIZE)
    if learned:
        config = config.replace(composition="learned_channel_scale")
    before, batch = snapshot(model), inputs(model)
    randomise(pelt_fast.inject(model, config)).train()
    site = model.model.layers[0].pelt_ffn_adapter
    model(**batch).loss.backward()
    out = model.model.layers[0].mlp.down_proj.weight
    assert site.is_packed and out.data_ptr() == site.packings.out.buffer.data_ptr()
    assert_fused_is_the_reference(model, batch)
    # a strided weight is still a weight to save
    assert same({n: v for n, v in model.state_dict().items() if n in before}, before)
    model.save_pretrained(tmp_path)
    pelt_fast.eject(model)
    assert same(snapshot(model), before) and out.is_contiguous()


@pytest.mark.parametrize("architecture", ["bart", "llama"])
def test_a_model_moved_and_evaluated_first_still_trains(architecture):
    """The move unpacks; what packs again may run in inference mode."""
    model = pelt_fast.inject(MODELS[architecture](), small_method("scaled_parallel_adapter"))
    batch = inputs(model)
    model.double().eval()
    with torch.inference_mode():
        model(**batch)
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_block_with_output_dropout_packs_only_what_it_reads():
    model = pelt_fast.inject(MODELS["bart"](), small_method("mam"))
    site = model.model.encoder.layers[0].pelt_ffn_adapter
    assert site.packings.out is None and site.is_packed


def test_a_move_to_another_dtype_packs_again():
    model = randomise(pelt_fast.inject(MODELS["bart"](), small_method("mam"))).eval()
    batch = inputs(model)
    expected = model(**batch).logits
    with pelt_fast.backend("reference"):
        same = model(**batch).logits
    model.double()
    logits = model(**batch).logits
    assert logits.dtype == torch.float64
    assert_near(expected, same, logits)
    assert all(site.plan == "packed, accumulate" for site in pelt_fast.explain(model).sites
               if site.op == "ffn")  # fmt: skip


@pytest.mark.parametrize("architecture", ["bart", "llama"])
def test_packed_blocks_follow_the_optimizer(architecture):
    model, config = MODELS[architecture](), small_method("scaled_parallel_adapter", JUDGED_SIZE)
    pelt_fast.inject(model, config).eval()
    randomise(model)
    batch = inputs(model)
    model(**batch)
    for module in model.modules():
        if hasattr(module, "down_weight"):
            for weight in (module.down_weight, module.up_weight):
                weight.data = weight.data * 2  # not even a version counter
    assert_fused_is_the_reference(model, batch)


def test_changing_a_trainable_weight_before_backward_is_an_error():
    model = randomise(pelt_fast.inject(MODELS["llama"](), small_method("scaled_parallel_adapter")))
    loss = model(**inputs(model)).loss
    with torch.no_grad():
        model.model.layers[0].pelt_ffn_adapter.down_weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name, message", [("mamm", "unknown method 'mamm': choose full")])
def test_unknown_method(name, message):
    with pytest.raises(ValueError, match=message):
        pelt_fast.inject(roberta(), name)


def test_a_method_must_be_a_name_or_a_config():
    with pytest.raises(TypeError, match="method must be a name or a PeltConfig"):
        pelt_fast.inject(roberta(), 3)
    with pytest.raises(TypeError, match="transformers model"):
        pelt_fast.inject(nn.Linear(2, 2), "lora")


def refused(model, method, error, message):
    """The call raises and the model is what it was."""
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        inject(model, method)
    assert same(snapshot(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes


def test_an_architecture_without_a_row_is_refused_with_the_way_to_add_one():
    with torch.device("meta"):  # nothing can be discovered without weights
        model = BioGptForCausalLM(
            BioGptConfig(
                **dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=11)
            )
        )
    with pytest.raises(ValueError, match=r"no table row for architecture 'biogpt'.*Layout"):
        pelt_fast.inject(model, "lora")


def test_a_model_that_does_not_fit_its_row_is_refused_with_what_was_looked_for():
    model = roberta()
    del model.roberta.encoder.layer[0].intermediate.dense
    refused(model, "mam_glue", ValueError, "looked for encoder.layer.0.intermediate.dense")


def test_injecting_twice_is_refused():
    model = pelt_fast.inject(roberta(), small_method("lora"))
    refused(model, "mam_glue", ValueError, "already carries 'lora': eject it first")


def test_ejecting_nothing_or_full_is_refused():
    model = roberta()
    with pytest.raises(ValueError, match="nothing is injected"):
        pelt_fast.eject(model)
    pelt_fast.inject(model, "full")
    with pytest.raises(ValueError, match="nothing to eject"):
        pelt_fast.eject(model)


@pytest.mark.parametrize("choice", ["flash_attention_2", "flex_attention"])
def test_an_attention_without_log_sum_exp_is_refused_for_prefixes(choice):
    model = llama()
    model.config._attn_implementation = choice
    refused(model, small_method("mam"), ValueError, f"'{choice}' cannot carry a prefix.*sdpa")
    pelt_fast.inject(model, small_method("lora"))  # LoRA does not mind


def test_a_head_alone_needs_a_head():
    refused(bart(), "linear_probe", ValueError, "BartForConditionalGeneration has none")


def test_a_target_the_model_lacks_is_refused():
    encoder_only = small_method("mam", where=("decoder",))
    refused(roberta(), encoder_only, ValueError, "no heads in decoder")


def test_lora_wider_than_the_matrix_warns_and_adapters_do_not(caplog):
    pelt_fast.inject(roberta(), pelt_fast.methods()["lora"].replace(size=40))
    assert "rank 40" in caplog.text and len(caplog.records) == 2  # one a target, q and v
    caplog.clear()
    pelt_fast.inject(roberta(), pelt_fast.methods()["houlsby"].replace(size=40))
    assert not caplog.records


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    from pelt_fast.injection import inject as module

    def fail(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setitem(module.BUILDERS, "bottleneck", fail)
    refused(bart(), small_method("mam"), RuntimeError, "no memory")


def test_decoder_alone_gets_no_cross_attention_prefix():
    from transformers import BartForCausalLM

    model = pelt_fast.inject(bart(BartForCausalLM), small_method("prefix"))
    assert not any("cross" in name for name, _ in model.named_parameters())
    model(**inputs(model)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_bart_large_trains_without_a_fallback():
    config = BartForConditionalGeneration.config_class(
        attention_dropout=0.1, activation_dropout=0.1
    )
    for method in pelt_fast.methods():
        if method in ("full", "linear_probe", "bitfit"):  # no sites
            continue
        with torch.device("meta"):
            model = BartForConditionalGeneration(config).train()
        explanation = pelt_fast.explain(pelt_fast.inject(model, method))
        assert explanation.training and explanation.sites and not explanation.fallbacks
        assert f"0 of {len(explanation.sites)} sites fell back" in str(explanation)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("architecture", ["bart", "gpt2", "phi3"])
def test_sites_are_in_the_mode_of_the_model(architecture, training):
    """Those on a part of a joined projection too: in training mode they would drop."""
    make = {**MODELS, **MORE}[architecture]
    methods = [small_method(name) for name in ("lora", "mam", "prompt", "houlsby")]
    for method in methods:
        model = pelt_fast.inject(make().train(training), method)
        assert {module.training for module in model.modules()} == {training}
    model = make().train(training)
    pelt_fast.inject_named(model, {"first": "lora"}, together=True)
    for method in methods:
        pelt_fast.add_method(model, method.name, method)
    assert {module.training for module in model.modules()} == {training}
