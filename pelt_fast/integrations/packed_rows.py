"""Whether a model keeps the sequences of a packed row apart, tried on the model itself.

Positions that start again tell a model where a sequence begins. Most decoders make a mask of them;
OPT, BLOOM, MPT and Mamba do not, and each of their sequences would see the ones before it.
"""

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pelt_fast.injection.synthetic_batch import synthetic_batch, why_no_run
from pelt_fast.injection.unchanged import unchanged
from pelt_fast.layouts.names import unwrapped


def why_not_packed(model: nn.Module) -> str | None:
    """Why the rows of a model cannot be packed, or None.

    Two short sequences are packed as TRL packs them, twice, each time behind another first
    sequence: the outputs of the second must be equal. Experts round by how many tokens they get,
    so where they are not, the outputs' gradient to the first sequence must be exactly zero. Of
    several processes the first one decides: the others may not have the weights yet.
    """
    return broadcast_object_list([_tried(model)])[0]


def keeps_apart(model: nn.Module) -> bool:
    """Whether each sequence of a packed row sees itself alone."""
    return why_not_packed(model) is None


def _tried(model: nn.Module) -> str | None:
    base = unwrapped(model)
    name, missing = type(base).__name__, why_no_run(base)
    if missing is not None:
        return f"a packed row cannot be tried on {name}: {missing}"
    try:
        with unchanged(base, training=False):
            apart = _apart(base)
    except Exception as error:  # a model may refuse positions with an error of any kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{name} takes no packed row ({reason})"
    return None if apart else f"{name} lets a sequence see the one before it in a packed row"


def _apart(model: nn.Module) -> bool:
    first, second = synthetic_batch(model)["input_ids"].tolist()
    with torch.no_grad():
        one, other = (_behind(model, before, second) for before in (first, first[::-1]))
    if torch.equal(one, other):
        return True
    given = []

    def leaf(module, arguments, output: Tensor) -> Tensor:
        given.append(output.detach().requires_grad_())
        return given[-1]

    hook = model.get_input_embeddings().register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            score = _behind(model, first, second).float().square().sum()
            (gradient,) = torch.autograd.grad(score, given)
    finally:
        hook.remove()
    return not gradient[0, : len(first)].any()


def _behind(model: nn.Module, before: list[int], ids: list[int]) -> Tensor:
    """The logits of a sequence behind another one in a row, (T, V)."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    lengths = [len(before), len(ids)]
    batch = collate([{"input_ids": [*before, *ids], "seq_lengths": lengths}])
    del batch["labels"]
    device = next(model.parameters()).device
    batch = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}
    return model(**batch, use_cache=False).logits[0, len(before) :]
