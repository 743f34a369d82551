"""The proof of a method that joins others in a model, where no row of the table describes it."""

import torch
from torch import nn

from pelt_fast.layouts.layout import StackLayout
from pelt_fast.modules.routing import NONE, Routes, Routing

from .prompt_proof import prove_prompt
from .record import Site
from .self_test import SelfTest


def prove_added(
    model: nn.Module,
    stacks: list[StackLayout],
    sites: list[Site],
    routing: Routing,
    method: int,
    discovered: bool,
) -> None:
    """ValueError where a method is not what its layout says: with an update of zero it gives what
    the base gives. Both run in the model as it is, with the other methods in it. ``method`` is the
    id of the new one, ``discovered`` says that its layout was found on the model."""
    with routing.using(Routes(torch.tensor([NONE]))):
        self_test = SelfTest(model, stacks, strict=discovered)
    with routing.using(Routes(torch.tensor([method]))):
        self_test.check(sites)
        if discovered:
            prove_prompt(model, sites)
