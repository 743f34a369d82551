"""How a prompt is put in front of a stack: which hooks are registered where.

A caller's inputs and outputs keep their lengths: token outputs, hidden states, logits and labels
stay aligned with the input ids, and pooling still uses the first token. Two tensors are longer by
P: the encoder outputs that a decoder reads, and the keys in ``attentions``, of which the first P
are the prompt's.

The virtual tokens are visible to every token, padded left or right; in a layer with a sliding
window as far as the window reaches, like tokens in their positions. They have no learned positions
(as in the paper's code). Under rotary positions, which are relative, they have the first P, and the
tokens follow. Token embeddings come from the stack's own input embeddings, with the hooks on them.
With a cache the prompt is put in front once, when the cache is empty (``prompt_cache``).

Several methods in one model share these hooks. Where the rows of a batch are under several of them,
as many virtual tokens as the longest prompt has are put in front of every row. A row with a shorter
prompt, or with none, has its own right in front of its tokens; those in front of them are hidden by
the padding mask, as tokens padded left are. So a model that gives a row padded left what it gives
the row alone gives each row what its own prompt alone gives.
"""

from torch import nn

from pelt_fast.layouts.layout import StackLayout
from pelt_fast.layouts.lookup import find
from pelt_fast.modules import Prompt
from pelt_fast.modules.routed_prompt import RoutedPrompt

from .prompt_front import Front, LayerFront, NormFront
from .prompt_tokens import DecoderFront, EncoderFront
from .record import Injection
from .undo_log import UndoLog


def attach_prompt(
    base: nn.Module, stack: StackLayout, prompt: Prompt | RoutedPrompt, injection: Injection
) -> None:
    """Register the hooks that put ``prompt`` in front of ``stack``."""
    layout, changes, owner = stack.prompt, injection.changes, find(base, stack.owner)
    strips = layout.strip is not None or stack.kind == "decoder"
    if layout.norm is not None:
        owner, front = base, NormFront(prompt, strips, layout.own_mask)
        _attach_to_norm(base, layout.norm, front, changes)
    elif layout.layer is not None:
        front = LayerFront(prompt, strips)
        changes.hook(find(base, layout.layer).register_forward_pre_hook(front.prepend))
    else:
        front = _token_front(base, stack, prompt, strips, changes)
    changes.hook(owner.register_forward_pre_hook(front.before, with_kwargs=True))
    changes.hook(owner.register_forward_hook(front.after, always_call=True))
    if layout.positions is not None and layout.norm is None and layout.layer is None:
        changes.call(find(base, layout.positions), front.learned_positions)
    if layout.strip is not None:
        changes.hook(find(base, layout.strip).register_forward_hook(front.strip))


def _attach_to_norm(base: nn.Module, path: str, front: NormFront, changes: UndoLog) -> None:
    norm, embeddings = find(base, path), find(base, path.rpartition(".")[0])
    changes.hook(norm.register_forward_pre_hook(front.prepend))
    hook = embeddings.register_forward_pre_hook(front.before_embeddings, with_kwargs=True)
    changes.hook(hook)


def _token_front(
    base: nn.Module,
    stack: StackLayout,
    prompt: Prompt | RoutedPrompt,
    strips: bool,
    changes: UndoLog,
) -> Front:
    path = stack.prompt.positions
    positions = None if path is None else find(base, path)
    if stack.kind == "decoder":
        return DecoderFront(prompt, strips, positions)
    front = EncoderFront(prompt, strips, positions)
    if hasattr(base, "decoder"):
        hook = base.decoder.register_forward_pre_hook(front.before_decoder, with_kwargs=True)
        changes.hook(hook)
    return front
