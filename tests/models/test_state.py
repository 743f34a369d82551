"""The state of one forward is that forward's: threads, two weight sets in one backward, writes that
no version counts, checkpoints of a model that has run."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import pelt_fast
from tests.models.test_bf16 import without_kinks
from tests.models.test_parity import small_method
from tests.small import MEANINGLESS, MODELS, PAD, inputs, outputs_and_gradients, randomise
from tests.threads import together

ARCHITECTURES = ("bart", "llama", "roberta")
EVERY = [
    (architecture, method) for architecture in ARCHITECTURES for method in pelt_fast.methods()
    if (architecture, method) not in MEANINGLESS
    and not (method == "linear_probe" and architecture in ("bart", "llama"))  # no task head
]  # fmt: skip
DECODERS = [pair for pair in EVERY if pair[0] in ("bart", "llama")]
PREFIXES = [pair for pair in EVERY if pair[1].startswith(("prefix", "mam"))]
THREADS, ROUNDS = 4, 3


def built(architecture: str, method: str, seed: int = 0, kinks: bool = True):
    """A model in fp64 without dropout, its trainable tensors drawn."""
    torch.manual_seed(seed)
    model = MODELS[architecture](dropout=0.0)
    config = small_method(method)
    if not config.is_full:
        config = config.replace(dropout=0.0) if kinks else without_kinks(config)
    return randomise(pelt_fast.inject(model, config)).double()


def trained(model) -> dict[str, torch.Tensor]:
    """What trains, as leaves of its own."""
    return {name: p.detach().clone().requires_grad_()
            for name, p in model.named_parameters() if p.requires_grad}  # fmt: skip


def batches(model, count: int, seed: int = 5) -> list[dict]:
    torch.manual_seed(seed)
    return [inputs(model, batch=2, length=6 + i) for i in range(count)]


def total(grads: dict, more: dict) -> dict:
    return {name: grads[name] + more[name] for name in grads}


def assert_same(found: dict, wanted: dict, tolerance: float = 1e-10) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = value.abs().max().clamp(min=1.0)
        assert (found[name] - value).abs().max() <= tolerance * scale, name


def squared(out) -> torch.Tensor:
    """A loss in fp64: the models' own is taken of logits in fp32."""
    return out.logits.pow(2).mean()


def loss_of(model, weights: dict, batch: dict) -> torch.Tensor:
    return squared(functional_call(model, weights, (), batch))


def gradients_of(loss: torch.Tensor, weights: dict) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {name: torch.zeros_like(weight) if grad is None else grad
            for (name, weight), grad in zip(weights.items(), found)}  # fmt: skip


@pytest.mark.parametrize("architecture, method", EVERY)
def test_four_threads_get_the_outputs_of_one(architecture, method):
    model = built(architecture, method).eval()
    given = batches(model, THREADS)
    with torch.no_grad():
        wanted = [model(**batch).logits for batch in given]

    def run(batch):
        with torch.no_grad():
            return [model(**batch).logits for _ in range(ROUNDS)]

    found = together([lambda batch=batch: run(batch) for batch in given])
    for runs, logits in zip(found, wanted):
        assert all(torch.allclose(each, logits, rtol=0, atol=1e-12) for each in runs)


@pytest.mark.parametrize("architecture, method", EVERY)
def test_four_threads_train_on_losses_of_their_own(architecture, method):
    model = built(architecture, method).train()
    given = batches(model, THREADS)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = [gradients_of(squared(model(**batch)), weights) for batch in given]

    def run(batch):
        return [gradients_of(squared(model(**batch)), weights) for _ in range(ROUNDS)]

    found = together([lambda batch=batch: run(batch) for batch in given])
    for runs, grads in zip(found, wanted):
        for each in runs:
            assert_same(each, grads)


@pytest.mark.parametrize("architecture, method", EVERY)
def test_two_weight_sets_in_one_backward(architecture, method):
    """Two forwards, then one backward: each has the gradient it has alone, and the one that
    central differences give."""
    model = built(architecture, method, kinks=False).eval()
    (batch,) = batches(model, 1)
    first = trained(model)
    second = {name: (0.5 * value.detach()).requires_grad_() for name, value in first.items()}
    alone = [gradients_of(loss_of(model, weights, batch), weights) for weights in (first, second)]
    joint = loss_of(model, first, batch) + loss_of(model, second, batch)
    both = gradients_of(joint, {**first, **{f"2.{n}": value for n, value in second.items()}})
    assert_same({n: both[n] for n in first}, alone[0])
    assert_same({n: both[f"2.{n}"] for n in second}, alone[1])
    with torch.no_grad():
        step = {n: 1e-3 * torch.randn_like(value) for n, value in first.items()}
        up, down = ({n: first[n] + sign * step[n] for n in first} for sign in (1, -1))
        difference = (loss_of(model, up, batch) - loss_of(model, down, batch)) / 2
    slope = sum((alone[0][n] * step[n]).sum() for n in first)
    # Llama's norms compute in fp32, which bounds what a difference can tell
    assert abs(difference - slope) <= 1e-2 * abs(slope) + 1e-6


@pytest.mark.parametrize("architecture, method", EVERY)
def test_a_step_inside_and_the_loss_behind_it(architecture, method):
    """A first-order meta gradient: of the loss on weights that a step has moved."""
    model = built(architecture, method).train()
    inner, outer = batches(model, 2)
    weights = trained(model)
    grads = gradients_of(loss_of(model, weights, inner), weights)
    moved = {n: weights[n] - 0.1 * grads[n] for n in weights}
    found = gradients_of(loss_of(model, weights, inner) + loss_of(model, moved, outer), weights)
    leaves = {n: value.detach().clone().requires_grad_() for n, value in moved.items()}
    fresh = copy.deepcopy(model)
    assert_same(found, total(grads, gradients_of(loss_of(fresh, leaves, outer), leaves)))


@pytest.mark.parametrize("architecture, method", EVERY)
@pytest.mark.parametrize("last_first", [False, True])
def test_two_batches_and_their_backward_in_either_order(architecture, method, last_first):
    model = built(architecture, method).train()
    given = batches(model, 2)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    alone = [gradients_of(squared(model(**batch)), weights) for batch in given]
    losses = [squared(model(**batch)) for batch in given]
    order = (1, 0) if last_first else (0, 1)
    for index in order:
        assert_same(gradients_of(losses[index], weights), alone[index])


class Drawn(nn.Module):
    """A weight with noise of its own at every reading."""

    def forward(self, weight):
        return weight + 0.1 * torch.randn_like(weight)


@pytest.mark.parametrize("architecture, method", [
    (a, m) for a, m in EVERY
    if a == "llama" and ("adapter" in m or m in ("houlsby", "mam", "lora", "pfeiffer"))
])  # fmt: skip
def test_drawn_weights_have_the_gradient_of_their_draw(architecture, method):
    model = built(architecture, method).train()
    (batch,) = batches(model, 1)
    plain = copy.deepcopy(model)
    sites = [module for module in model.modules() if hasattr(module, "up_weight")]
    for site in sites:
        parametrize.register_parametrization(site, "up_weight", Drawn())
    torch.manual_seed(1)
    losses = [squared(model(**batch)) for _ in range(2)]
    found = {n.replace("parametrizations.", "").replace(".original", ""): p
             for n, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    joint = gradients_of(sum(losses), found)
    wanted = None
    torch.manual_seed(1)
    names = [n for n, module in plain.named_modules() if hasattr(module, "up_weight")]
    for _ in range(2):
        # one draw a forward: the sites read it in the order of the layers
        twin = copy.deepcopy(plain)
        for name in names:
            weight = twin.get_submodule(name).up_weight
            with torch.no_grad():
                weight.copy_(Drawn()(weight))
        weights = {n: p for n, p in twin.named_parameters() if p.requires_grad}
        grads = gradients_of(squared(twin(**batch)), weights)
        wanted = grads if wanted is None else total(wanted, grads)
    assert_same(joint, wanted)


def write(model, how: str) -> None:
    """Other trainable weights, by a write that torch counts no version of."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            if how == "copy":
                parameter.data.copy_(0.5 * parameter.data)
            else:
                parameter.data.mul_(0.5)


@pytest.mark.parametrize("how", ["copy", "in place"])
@pytest.mark.parametrize("architecture, method", EVERY)
def test_a_write_past_the_version_count_is_seen(architecture, method, how):
    model = built(architecture, method).eval()
    (batch,) = batches(model, 1)
    with torch.no_grad():
        before = model(**batch).logits
        write(model, how)
        after = model(**batch).logits
        wanted = pickle.loads(pickle.dumps(model))(**batch).logits
    assert torch.equal(after, wanted) and not torch.equal(after, before)


def decode(model, ids, **options) -> torch.Tensor:
    """The logits of a few greedy steps."""
    out = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False,
                         pad_token_id=PAD, output_logits=True, return_dict_in_generate=True,
                         **options)  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize("architecture, method", DECODERS)
def test_a_write_between_two_generates_is_seen(architecture, method):
    model = built(architecture, method).eval()
    ids = batches(model, 1)[0]["input_ids"]
    before = decode(model, ids)
    write(model, "copy")
    assert torch.equal(decode(model, ids), decode(copy.deepcopy(model), ids))
    assert not torch.equal(decode(model, ids), before)


def counted(bank) -> list:
    """The runs of a bank's reparameterisation."""
    runs = []
    bank.mlp.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("architecture", ["bart", "llama"])
def test_generate_makes_a_prefix_once_and_keeps_nothing(architecture):
    model = built(architecture, "prefix").eval()
    ids = batches(model, 1)[0]["input_ids"]
    banks = {site.module for site in model._pelt.sites}
    runs = [counted(bank) for bank in banks]

    class Stop(Exception):
        pass

    def nested(found, scores):
        """A generate inside a generate, with weights of its own."""
        if len(seen) < 1:
            seen.append(1)
            write(model, "copy")
            seen.append(decode(model, ids))
            seen.append(decode(copy.deepcopy(model), ids))
        return scores

    def stop(found, scores):
        raise Stop

    decode(model, ids)
    assert [len(each) for each in runs] == [1] * len(banks)
    seen = []
    decode(model, ids, logits_processor=[nested])
    assert torch.equal(seen[1], seen[2])
    with pytest.raises(Stop):
        decode(model, ids, logits_processor=[stop])
    write(model, "in place")
    assert torch.equal(decode(model, ids), decode(copy.deepcopy(model), ids))
    own = type(model).generate
    assert pelt_fast.eject(model).generate.__func__ is own and "generate" not in vars(model)


def test_threads_generate_at_once():
    model = built("llama", "prefix").eval()
    ids = [batch["input_ids"] for batch in batches(model, THREADS)]
    wanted = [decode(model, each) for each in ids]
    found = together([lambda each=each: decode(model, each) for each in ids])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("architecture, method", PREFIXES)
def test_two_forwards_before_one_backward_under_checkpointing(architecture, method, reentrant):
    model = built(architecture, method).train()
    first, second = batches(model, 2)
    wanted = total(*(outputs_and_gradients(model, batch)[1] for batch in (first, second)))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    if reentrant:
        model.enable_input_require_grads()
    model.zero_grad()
    (model(**first).loss + model(**second).loss).backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_evaluation_before_the_backward_leaves_a_checkpoint_alone(reentrant):
    model = built("llama", "prefix").train()
    first, second = batches(model, 2)
    wanted = outputs_and_gradients(model, first)[1]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    model.zero_grad()
    loss = model(**first).loss
    with torch.no_grad():
        model.eval()(**second)
    model.train()
    loss.backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)


@pytest.mark.parametrize("architecture, method", EVERY)
def test_a_forward_adds_nothing_to_what_is_saved(architecture, method, tmp_path):
    model = built(architecture, method).float()
    keys = set(model.state_dict())
    (batch,) = batches(model, 1)
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
    model.train()(**batch).loss.backward()
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    other = built(architecture, method, seed=1).float()
    other.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(other.eval()(**batch).logits, wanted)


def test_a_checkpoint_of_the_trainer_after_its_first_step(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = built("llama", "prefix_nomlp").float()
    rows = [dict(input_ids=torch.arange(4, 10), labels=torch.arange(4, 10))] * 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()
