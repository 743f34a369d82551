"""One cell of the grid, an architecture under a method: refused with a reason, or everything holds.

What is checked: outputs and every gradient of the fused path, padded left, right and not: with the
method's dropout by the fp64 budget, with every dropout of the model too against the reference under
the same masks; the base in bf16 under an fp32 method; evaluation without autograd, inject and eject bit for bit, generation with a cache
and without, the paper's parameter count by its own formula.
"""

import math

import torch

import pelt_fast
from pelt_fast.layouts.lookup import base_of, find, stacks_of
from tests.models.judge import exactly
from tests.models.test_parity import assert_close, outputs_and_gradients
from tests.small import MODELS, MORE, PAD, inputs, randomise

ARCHITECTURES = {**MODELS, **MORE}
METHODS = [name for name in pelt_fast.methods() if name not in ("full", "linear_probe")]
PADDINGS = [None, "left", "right"]
SIZE = 5
TRIES = 3  # batches


def small(method: str):
    """A preset, its ranks small enough for small models."""
    return pelt_fast.methods()[method].replace(size=SIZE)


def refusal(architecture: str, method: str) -> str | None:
    """Why ``inject`` refuses the pair, or None; the model is then as it was."""
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture]()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        pelt_fast.inject(model, small(method))
    except ValueError as error:
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
        return str(error)
    return None


def hold(architecture: str, method: str) -> None:
    """AssertionError where anything does not hold."""
    torch.manual_seed(0)
    _with_every_dropout(randomise(pelt_fast.inject(ARCHITECTURES[architecture](), small(method))))
    _in_bf16(architecture, method)
    model = ARCHITECTURES[architecture](dropout=0.0)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = inputs(model.eval(), padding="right")
    with torch.no_grad():
        plain = model(**batch).logits
    randomise(pelt_fast.inject(model, small(method)))
    _same_as_the_reference(model)
    _counted(model)
    _generates(model)
    pelt_fast.eject(model)
    now = model.state_dict()
    assert now.keys() == weights.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in weights.items())
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, plain)


def _paddings(model) -> list[str | None]:
    return [None] if model.config.model_type in ("vit", "whisper") else PADDINGS


def _judged(model) -> list[str | None]:
    """The paddings that fp64 can judge: eager softmax is fp32 in an fp64 model too, and a row of
    nothing but fp64's lowest is NaN there."""
    eager = model.config._attn_implementation.endswith("eager")
    return [p for p in _paddings(model) if p is None or not eager]


def _same_as_the_reference(model) -> None:
    for padding in _judged(model):
        misses = []
        while not misses or misses[-1] is not None:
            assert len(misses) < TRIES, misses
            misses.append(_miss(model, inputs(model, batch=8, padding=padding)))


def _miss(model, batch: dict) -> tuple | None:
    """What is past its budget in training or evaluation, or None."""
    found = {}
    model.train()
    for name in ("auto", "reference"):
        with pelt_fast.backend(name):
            logits, grads = outputs_and_gradients(model, batch)
        found[name] = {"logits": logits, **grads}
    miss = past_budget(found["auto"], found["reference"], exactly(model, batch))
    if miss is not None:
        return miss
    model.eval()
    with torch.no_grad():
        logits = {"logits": model(**batch).logits}
        with pelt_fast.backend("reference"):
            same = {"logits": model(**batch).logits}
    return past_budget(logits, same, {"logits": exactly(model, batch)["logits"]})


def past_budget(found: dict, same: dict, exact: dict) -> tuple | None:
    """The worst tensor where it is further from fp64 than four times the reference's worst, or
    None. What a random model makes of roundings varies widely from batch to batch, for either
    path: hence four, where an op has two, and the worst of all tensors; a path that is wrong is
    wrong in every batch."""
    assert found.keys() == exact.keys()
    sizes = {key: wanted.norm().item() for key, wanted in exact.items()}
    grads = [size for key, size in sizes.items() if key != "logits"]
    # what nearly cancels, as a learned scale's one number does, is measured by the others
    floor = 0.1 * (sum(size**2 for size in grads) / max(len(grads), 1)) ** 0.5
    errors, theirs = (
        {
            key: math.inf if off != off else off / max(sizes[key], floor, 1e-30)
            for key, wanted in exact.items()
            for off in [(tensors[key].double() - wanted).norm().item()]
        }
        for tensors in (found, same)
    )
    worst = max(errors, key=errors.get)
    budget = 4 * max(theirs.values()) + 8 * torch.finfo(torch.float32).eps
    return None if errors[worst] <= budget < math.inf else (worst, errors[worst], budget)


def _with_every_dropout(model) -> None:
    """A mask that one path draws otherwise is off by the size of the numbers themselves."""
    for padding in _paddings(model):
        batch = inputs(model.train(), padding=padding)
        logits, grads = outputs_and_gradients(model, batch)
        with pelt_fast.backend("reference"):
            same, same_grads = outputs_and_gradients(model, batch)
        assert_close({"logits": logits, **grads}, {"logits": same, **same_grads}, tolerance=1e-3)


def _in_bf16(architecture: str, method: str) -> None:
    """The base in bf16, the method in fp32: outputs and gradients by the same budget."""
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture](dropout=0.0).bfloat16()
    randomise(pelt_fast.inject(model, small(method))).train()
    misses = []
    while not misses or misses[-1] is not None:
        assert len(misses) < TRIES, misses
        batch = inputs(model, batch=8, padding=_judged(model)[-1])
        batch = {n: t.bfloat16() if t.is_floating_point() else t for n, t in batch.items()}
        misses.append(_miss(model, batch))


def _counted(model) -> None:
    """The paper's count (appendix B) from the widths of the base's own layers."""
    config, base = model._pelt.config, base_of(model)
    expected = 0
    for modification in config.modifications:
        if modification.form not in ("low_rank", "prefix", "bottleneck"):
            return  # prompts and biases have formulas of their own in tests/models/test_count.py
        for stack in stacks_of(model):
            for layer in find(base, stack.layers):
                expected += _of_layer(layer, stack, modification, len(stacks_of(model)) > 1)
    assert pelt_fast.count_parameters(model).paper == expected


def _of_layer(layer, stack, modification, whole: bool) -> int:
    def width(path: str) -> tuple[int, int]:
        return tuple(find(layer, path).weight.shape)  # (out, in)

    rank, total, target = modification.size, 0, modification.target
    if target.startswith("ffn"):
        if stack.kind not in modification.where:
            return 0
        into, out = width(stack.ffn.in_proj), width(stack.ffn.out_proj)
        if target == "ffn":
            inputs_ = out[0] if modification.insertion == "sequential" else into[1]
            return rank * (inputs_ + out[0])
        paths = [stack.ffn.out_proj] if target == "ffn.out" else [
            path for path in (stack.ffn.in_proj, stack.ffn.gate_proj) if path
        ]  # fmt: skip
        return sum(rank * sum(width(path)) for path in paths)
    for slot in stack.attentions:
        if slot.kind not in modification.where or (slot.kind == "cross" and not whole):
            continue
        q, k, out = width(slot.q), width(slot.k), width(slot.out)
        if modification.form == "prefix":
            total += 2 * rank * k[0]
        elif modification.form == "low_rank":
            path = slot.out if target.endswith(".o") else getattr(slot, target[-1])
            total += rank * sum(width(path))
        elif target == "heads":
            total += _of_heads(layer, slot, modification, k)
        elif modification.insertion == "sequential":
            total += 2 * rank * out[0]
        else:
            total += rank * (q[1] + out[0])
    return total


def _of_heads(layer, slot, modification, k) -> int:
    from pelt_fast.injection.dimensions import head_dim_of

    dim = head_dim_of(layer, slot)
    heads = (
        k[0] // dim
        if modification.reads == "query"
        else find(layer, slot.out).weight.shape[1] // dim
    )
    return 2 * heads * modification.size * dim


def _generates(model) -> None:
    """The same tokens with a cache and without, padded left where that is possible."""
    if not model.can_generate() or model.config.model_type == "whisper":
        return
    batch = inputs(model.eval(), padding=None if model.config.is_encoder_decoder else "left")
    given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=PAD)
    cached = model.generate(**given, **settings, use_cache=True)
    assert torch.equal(cached, model.generate(**given, **settings, use_cache=False))
