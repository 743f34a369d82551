"""TRL's trainers on an injected model: a checkpoint holds the method, not the base.

Needs the extra ``instruct``.
"""

import copy
import logging

from torch import nn
from trl import DPOTrainer, SFTTrainer

from pelt_fast.layouts.names import unwrapped
from pelt_fast.modules.projection_view import LORA

from .packed_rows import why_not_packed
from .trainer import MethodCheckpoints

logger = logging.getLogger("pelt_fast")


def _refuse_output_layer(model: nn.Module) -> None:
    """ValueError for a LoRA on the output layer: TRL multiplies by the layer's weight itself and
    never calls the layer."""
    head = unwrapped(model).get_output_embeddings()
    if head is not None and LORA in head._modules:
        raise ValueError(
            "TRL reads the output layer's weight without calling the layer, so a LoRA on it would"
            " not train: leave the output layer out, or use PeltTrainer"
        )


class _MethodTrainer(MethodCheckpoints):
    """What TRL does to a model that is not PEFT's, undone: on a quantised base it casts what trains
    to bf16, and it writes the card of a whole model."""

    def __init__(self, model: nn.Module, *args, **kwargs):
        _refuse_output_layer(model)
        before = {parameter: parameter.data for parameter in model.parameters()
                  if parameter.requires_grad}  # fmt: skip
        super().__init__(model, *args, **kwargs)
        for parameter, data in before.items():
            if parameter.dtype != data.dtype:  # the digits that bf16 lost are in the old data
                parameter.data = data.to(parameter.device)

    def create_model_card(self, *args, **kwargs) -> None:
        """None: ``pelt_fast.push_to_hub`` writes a method's card."""


class PeltSFTTrainer(_MethodTrainer, SFTTrainer):
    """TRL's ``SFTTrainer``, with checkpoints that hold the method alone.

    It takes what SFTTrainer takes. ``packing=True`` needs no padding: each sequence of a row sees
    itself and the method alone. That is tried on the model first. Where it does not hold the rows
    are padded, which is said.

    Args:
        model: an injected model.

    Example:
        pelt_fast.inject(model, "lora")
        PeltSFTTrainer(model, SFTConfig("runs/sft"), train_dataset=rows).train()
    """

    def __init__(self, model: nn.Module, args=None, *more, **kwargs):
        super().__init__(model, self._packed_or_padded(model, args), *more, **kwargs)

    def _packed_or_padded(self, model: nn.Module, args):
        """The settings, without packing where the model's sequences would see each other."""
        packed = getattr(args, "packing", False) and args.packing_strategy.startswith("bfd")
        reason = why_not_packed(model) if packed or getattr(args, "padding_free", False) else None
        if reason is None:
            return args
        if args.process_index == 0:
            self._tell(f"{reason}: the rows are padded, not packed")
        args = copy.copy(args)
        args.packing = args.eval_packing = args.padding_free = False
        return args

    def _tell(self, line: str) -> None:
        logger.warning(line)


class PeltDPOTrainer(_MethodTrainer, DPOTrainer):
    """TRL's ``DPOTrainer``, with checkpoints that hold the method alone.

    It takes what DPOTrainer takes. ``DPOConfig(precompute_ref_log_probs=True)`` takes the
    reference's probabilities from the model itself before the first step: from the base, where the
    method is new. Without it TRL loads the base a second time.

    Args:
        model: an injected model.

    Example:
        pelt_fast.inject(model, "lora")
        settings = DPOConfig("runs/dpo", precompute_ref_log_probs=True)
        PeltDPOTrainer(model, args=settings, train_dataset=pairs).train()
    """
