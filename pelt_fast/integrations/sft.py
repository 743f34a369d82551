"""TRL's SFTTrainer on an injected model: a checkpoint holds the method, not the base.

Needs the extra ``instruct``.
"""

from torch import nn
from trl import SFTTrainer

from .trainer import MethodCheckpoints


class PeltSFTTrainer(MethodCheckpoints, SFTTrainer):
    """TRL's ``SFTTrainer``, with checkpoints that hold the method alone.

    It takes what SFTTrainer takes. ``packing=True`` needs no padding: each sequence of a row sees
    itself and the method alone. TRL casts what trains on a quantised base to bf16; here it keeps
    its dtype. No model card is written: TRL's is of a whole model.

    Args:
        model: an injected model.

    Example:
        pelt_fast.inject(model, "lora")
        PeltSFTTrainer(model, SFTConfig("runs/sft"), train_dataset=rows).train()
    """

    def __init__(self, model: nn.Module, *args, **kwargs):
        dtypes = {parameter: parameter.dtype for parameter in model.parameters()}
        super().__init__(model, *args, **kwargs)
        for parameter, dtype in dtypes.items():
            if parameter.requires_grad and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)

    def create_model_card(self, *args, **kwargs) -> None:
        """None: ``pelt_fast.push_to_hub`` writes a method's card."""
