"""disabled: the base alone answers, bit for bit, and the method is as it was afterwards."""

import copy
import pickle

import accelerate
import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pelt_fast
from pelt_fast import Modification, PeltConfig
from pelt_fast.modules.base_parameters import BaseParameters
from pelt_fast.modules.switch import EAGER
from tests.models.test_parity import small_method
from tests.small import MODELS, bert, gpt2, inputs, llama, randomise, t5
from tests.threads import in_a_thread, together

ARCHITECTURES = {"bart": MODELS["bart"], "bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5}
PRESETS = [name for name, config in pelt_fast.methods().items() if not config.is_full]
# Llama and T5 have no biases, and language models no task head
MEANINGLESS = {("llama", "bitfit"), ("t5", "bitfit")} | {
    (name, "linear_probe") for name in ("bart", "gpt2", "llama", "t5")
}
PAIRS = [(a, m) for a in ARCHITECTURES for m in PRESETS if (a, m) not in MEANINGLESS]


def config_of(method: str) -> PeltConfig:
    return small_method(method) if pelt_fast.methods()[method].modifications else method


def run(model, batch, training=False):
    """Logits from one seed."""
    model.train(training)
    torch.manual_seed(3)
    return model(**batch).logits.detach()


def trained(architecture: str, method) -> tuple:
    """An injected model whose every trained tensor has changed, a batch, and the base's logits in
    evaluation and in training."""
    # frozen: torch has another attention for a position bias (T5) that trains
    model = ARCHITECTURES[architecture](dropout=0.2).requires_grad_(False)
    batch = inputs(model, padding=None if architecture == "gpt2" else "right")
    base = [run(model, batch), run(model, batch, True)]
    return randomise(pelt_fast.inject(model, method)), batch, base


@pytest.mark.parametrize("architecture, method", PAIRS)
def test_the_base_alone_answers_bit_for_bit(architecture, method):
    model, batch, base = trained(architecture, config_of(method))
    own = run(model, batch)
    assert not torch.equal(own, base[0])
    with pelt_fast.disabled(model) as same:
        assert same is model
        with pelt_fast.disabled(model):
            assert torch.equal(run(model, batch, True), base[1])
        assert torch.equal(run(model, batch), base[0])  # still in the outer block
        # another thread has the method
        assert torch.equal(in_a_thread(lambda: run(model, batch)), own)
    assert torch.equal(run(model, batch), own)


PLACEMENTS = {
    "heads of the input": Modification("bottleneck", "heads", size=3, reads="input"),
    "after_output": Modification("bottleneck", "attention", size=3, placement="after_output"),
    "before_dropout": Modification("bottleneck", "ffn", size=3, placement="before_dropout"),
    "residual": Modification("bottleneck", "ffn", size=3, reads="residual"),
    "norm": Modification("bottleneck", "ffn", "sequential", size=3, placement="after_norm"),
    "around": Modification("bottleneck", "ffn", "sequential", size=3, placement="around_norm"),
    "alone": Modification("bottleneck", "ffn", "sequential", size=3, residual=False),
}


@pytest.mark.parametrize("architecture", ["bart", "gpt2"])
@pytest.mark.parametrize("place", PLACEMENTS)
def test_every_placement_is_off(architecture, place):
    model, batch, base = trained(architecture, PeltConfig(place, (PLACEMENTS[place],)))
    with pelt_fast.disabled(model):
        assert all(torch.equal(run(model, batch, i == 1), base[i]) for i in range(2))


def test_lora_below_an_adapter_and_on_parts_of_one_matrix_are_off():
    method = pelt_fast.lora(3, targets="q,k,v,o,ffn.in,ffn.out") + pelt_fast.adapter(3)
    for architecture in ("gpt2", "bart"):
        model, batch, base = trained(architecture, method)
        with pelt_fast.disabled(model):
            assert all(torch.equal(run(model, batch, i == 1), base[i]) for i in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_answer_as_they_did_in_their_own_memory(dtype):
    """A wider model, where a product of a transposed matrix is rounded otherwise."""
    model = MODELS["bart"](d_model=256, encoder_ffn_dim=768, decoder_ffn_dim=768).to(dtype)
    batch = inputs(model, batch=4, length=16)
    base = run(model, batch)
    randomise(pelt_fast.inject(model, "scaled_parallel_adapter", r=24))
    with pelt_fast.disabled(model):
        assert torch.equal(run(model, batch), base)


def test_an_exception_ends_the_block():
    model, batch, base = trained("bart", "mam")
    own = run(model, batch)
    with pytest.raises(KeyError), pelt_fast.disabled(model):
        raise KeyError
    assert torch.equal(run(model, batch), own)
    tables = [type(module._parameters) for module in model.modules()]
    assert set(tables) == {dict}
    with pelt_fast.disabled(model):
        assert torch.equal(run(model, batch), base[0])


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_block_that_cannot_begin_leaves_nothing(fails_at, monkeypatch):
    model, batch, _ = trained("bert", "bitfit")
    own, tables = run(model, batch), [module._parameters for module in model.modules()]
    put, calls = BaseParameters.put, []

    def failing(parameters):
        calls.append(parameters)
        if len(calls) == fails_at:
            raise MemoryError("no memory")
        put(parameters)

    monkeypatch.setattr(BaseParameters, "put", failing)
    with pytest.raises(MemoryError, match="no memory"), pelt_fast.disabled(model):
        pass
    assert all(module._parameters is table for module, table in zip(model.modules(), tables))
    assert not model._pelt.switch.any_block
    assert EAGER.stance is None and not EAGER.blocks
    assert torch.equal(run(model, batch), own)


@pytest.mark.parametrize("method", ["bitfit", "mam", "lora", "prompt"])
def test_threads_do_not_see_each_other(method):
    model, batch, base = trained("bert", config_of(method))
    own = run(model, batch)

    def without() -> bool:
        found = []
        for _ in range(8):
            with torch.no_grad(), pelt_fast.disabled(model):
                found.append(torch.equal(model(**batch).logits, base[0]))
        return all(found)

    def within() -> bool:
        with torch.no_grad():
            return all(torch.equal(model(**batch).logits, own) for _ in range(16))

    assert together([without, within, without, within]) == [True] * 4
    assert torch.equal(run(model, batch), own)


@pytest.mark.parametrize("method", ["prefix", "prompt", "lora"])
def test_generate_is_the_base_s(method):
    model = llama()
    ids = torch.randint(4, 60, (2, 5))
    wanted = model.eval().generate(ids, max_new_tokens=5, do_sample=False)
    randomise(pelt_fast.inject(model, config_of(method)), 1.0)
    own = model.generate(ids, max_new_tokens=5, do_sample=False)
    with pelt_fast.disabled(model):
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), wanted)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), own)


def gradient_of_input(model, ids):
    """Logits and the gradient at the embedded tokens."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    torch.manual_seed(3)
    out = model(inputs_embeds=embedded).logits
    return embedded, out


@pytest.mark.parametrize("reentrant", [False, True, None], ids=["frame", "reentrant", "plain"])
@pytest.mark.parametrize("method", ["lora", "mam", "prefix", "bitfit", "houlsby"])
def test_a_backward_after_the_block_is_the_base_s(method, reentrant):
    model = gpt2(dropout=0.2).train()
    if reentrant is not None:
        arguments = dict(use_reentrant=reentrant)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    ids = torch.randint(4, 60, (2, 7))
    embedded, out = gradient_of_input(model, ids)
    out.sum().backward()
    randomise(pelt_fast.inject(model, config_of(method)))
    with pelt_fast.disabled(model):
        same, answer = gradient_of_input(model, ids)
    own, outs = gradient_of_input(model, ids)  # and one with the method, at the same time
    answer.sum().backward()
    outs.sum().backward()
    assert torch.equal(answer, out) and torch.equal(same.grad, embedded.grad)
    again, outs = gradient_of_input(model, ids)
    outs.sum().backward()
    assert torch.equal(own.grad, again.grad)
    assert not torch.equal(own.grad, embedded.grad)


def test_a_user_s_own_checkpoint_runs_again_without_the_method():
    model = randomise(pelt_fast.inject(llama().train(), "lora", r=3))
    x = torch.randn(2, 5, 32, requires_grad=True)
    mlp = model.model.layers[0].self_attn.q_proj
    with pelt_fast.disabled(model):
        (wanted,) = torch.autograd.grad(mlp(x).tanh().sum(), x)
        out = checkpoint(lambda x: mlp(x).tanh(), x, use_reentrant=False)
    (found,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(found, wanted)


def test_a_compiled_model_has_the_base_in_a_block_and_its_graph_afterwards():
    model = llama(num_hidden_layers=1).eval()
    batch = inputs(model)
    base = run(model, batch)
    randomise(pelt_fast.inject(model, "mam", r=3, length=3))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        own, plain = compiled(**batch).logits, model(**batch).logits
        with pelt_fast.disabled(model):
            assert torch.equal(compiled(**batch).logits, base)
            other = in_a_thread(lambda: compiled(**batch).logits)
            assert torch.equal(other, plain) and not torch.equal(other, base)
        with pelt_fast.disabled(compiled):
            assert torch.equal(compiled(**batch).logits, base)
        assert torch.equal(compiled(**batch).logits, own)


def test_a_block_inside_of_what_is_compiled():
    model = randomise(pelt_fast.inject(llama(num_hidden_layers=1).eval(), "lora", r=3))
    batch = inputs(model)

    def difference():
        with torch.no_grad():
            own = model(**batch).logits
            with pelt_fast.disabled(model):
                base = model(**batch).logits
            return own - base

    wanted = difference()
    torch._dynamo.reset()
    found = torch.compile(difference, backend="eager")()
    assert wanted.abs().max() > 0.01 and torch.equal(found, wanted)


def test_a_copy_and_a_pickle_have_a_switch_of_their_own():
    model, batch, base = trained("bert", "mam_glue")
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    own = run(model, batch)
    for twin in twins:
        with pelt_fast.disabled(model):
            assert torch.equal(run(twin, batch), own)
        with pelt_fast.disabled(twin):
            assert torch.equal(run(twin, batch), base[0]) and torch.equal(run(model, batch), own)


def test_what_trains_and_what_is_saved_is_the_same_in_a_block(tmp_path):
    model, batch, _ = trained("bert", "bitfit")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with pelt_fast.disabled(model):
        now = model.state_dict()
        assert now.keys() == state.keys() and all(torch.equal(now[n], t) for n, t in state.items())
        pelt_fast.save(model, tmp_path)
        held = [p for module in model.modules() for p in module._parameters.values()]
        assert list(map(id, held)) == list(map(id, model.parameters()))
    model(**batch).loss.backward()
    optimizer.step()
    assert any(not torch.equal(model.state_dict()[n], t) for n, t in state.items())


@pytest.mark.parametrize("method", ["mam", "bitfit"])
def test_offloaded_weights_are_off(method):
    model, batch, base = trained("bert", config_of(method))
    trains = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        own = run(model, batch)
        with pelt_fast.disabled(model):
            assert torch.equal(run(model, batch), base[0])
        assert torch.equal(run(model, batch), own) and not torch.equal(own, base[0])
    assert [p.requires_grad for p in model.parameters()] == trains


def test_named_methods_are_off():
    model = MODELS["bart"]()
    batch = inputs(model)
    base = run(model, batch)
    pelt_fast.inject_named(model, {"a": small_method("lora"), "b": small_method("mam")})
    randomise(model)
    with pelt_fast.disabled(model):
        assert torch.equal(run(model, batch), base)
    pelt_fast.set_active(model, "b")
    with pelt_fast.disabled(model):
        assert torch.equal(run(model, batch), base)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_an_accelerated_peft_model(kind):
    model = llama().eval()
    batch = inputs(model)
    base = run(model, batch)
    if kind == "lora":
        config = peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    else:
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = pelt_fast.accelerate_peft(peft.get_peft_model(model, config))
    own = run(model, batch)
    with pelt_fast.disabled(model):
        assert torch.equal(run(model, batch), base)
        assert torch.equal(in_a_thread(lambda: run(model, batch)), own)
    assert torch.equal(run(model, batch), own) and not torch.equal(own, base)


def test_what_peft_runs_itself_is_refused():
    model = peft.get_peft_model(
        llama(), peft.LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"])
    )
    pelt_fast.accelerate_peft(model)
    refused(model, "embed_tokens is a Embedding that PEFT runs itself")


def refused(model, message):
    with pytest.raises(ValueError, match=message), pelt_fast.disabled(model):
        pass


def test_a_base_that_is_gone_is_refused():
    refused(llama(), "nothing is injected")
    refused(pelt_fast.inject(llama(), "full"), "full fine-tuning trains the base")
    merged = pelt_fast.merge(pelt_fast.inject(llama(), "lora").eval())
    refused(merged, "'lora' is merged into the base: unmerge it first")
    with pelt_fast.disabled(pelt_fast.unmerge(merged)):
        pass
    model = pelt_fast.inject(llama(), "lora")
    model.model.norm.weight.requires_grad_(True)
    refused(model, "model.norm.weight trains and is no part of 'lora'")
    wrapped = nn.DataParallel(pelt_fast.inject(llama(), "lora"))
    wrapped.device_ids = [0, 1]
    refused(wrapped, "DataParallel runs the model in threads of its own")


def test_eject_and_merge_wait_for_the_end_of_the_block():
    model = pelt_fast.inject(llama(), "lora")
    for call in (pelt_fast.eject, pelt_fast.merge):
        with pytest.raises(RuntimeError, match="block of disabled"), pelt_fast.disabled(model):
            call(model)
    pelt_fast.eject(model)
