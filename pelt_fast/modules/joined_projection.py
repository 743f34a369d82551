"""LoRA on parts of one matrix: this runs instead of the projection that holds the matrix."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pelt_fast import functional
from pelt_fast.ops.common import dispatch

from .frozen_module import FrozenModule
from .hooked import at_hand, is_away
from .late import in_force
from .projection_view import LORA, ProjectionView
from .rows import Rows


class JoinedProjection(nn.Module):
    """Runs instead of a projection whose parts have LoRA: one GEMM of the whole matrix and one rank
    update. The A factors are stacked by rows, the B factors on a block diagonal. The parts read the
    same dropped input."""

    def __init__(self, owner: nn.Module):
        super().__init__()
        self.__dict__["owner"] = owner
        self.frozen = FrozenModule(ProjectionView(owner, "", None))

    def part(self, part: ProjectionView) -> ProjectionView:
        """Register ``part``, so that modules put on it belong to the model."""
        self.add_module(part.name, part.train(self.training))
        return part

    def why_beside(self) -> str | None:
        """Why the updates are added to the output of the projection itself, or None."""
        return self.frozen.why_not_read()

    def forward(self, x: Tensor) -> Tensor:
        sites = [(part.which, part._modules[LORA]) for part in self.children()
                 if LORA in part._modules and not part._modules[LORA].is_folded()]  # fmt: skip
        if not sites or sites[0][1].switch.is_off():
            return self.frozen.bare(x)
        if any(is_away(site) for _, site in sites):  # read here, so that their hooks do not run
            with at_hand(site for _, site in sites):
                return self._updated(x, sites)
        return self._updated(x, sites)

    def _updated(self, x: Tensor, sites: list) -> Tensor:
        probabilities = {in_force(site.dropout) for _, site in sites}
        reason = self.why_beside()
        if reason is not None:
            dispatch.fall_back(f"LoRA beside the projection's own output, because {reason}")
        if reason is not None or len(probabilities) > 1:
            return self._beside(x, sites)
        whole = self.frozen.module
        return functional.lora_linear(
            x, whole.weight, whole.bias, torch.cat([site.lora_a for _, site in sites]),
            self._stacked(sites), scale=1.0, dropout_p=probabilities.pop(),
        )  # fmt: skip

    def low_rank(self) -> tuple[Tensor, Tensor, float, float]:
        """lora_a (sum of R, K), lora_b (N, sum of R), the scale and the dropout of all parts as one
        update of the whole projection."""
        sites = [(part.which, part._modules[LORA]) for part in self.children()
                 if LORA in part._modules]  # fmt: skip
        lora_a = torch.cat([site.lora_a for _, site in sites])
        return lora_a, self._stacked(sites), 1.0, in_force(sites[0][1].dropout)

    def _stacked(self, sites: list) -> Tensor:
        """The second factors (N, sum of R) on a block diagonal, scaled."""
        ranks = [site.lora_a.shape[0] for _, site in sites]
        lora_b, first = 0, 0
        for (rows, site), rank in zip(sites, ranks):
            columns = (first, sum(ranks) - first - rank)
            lora_b = lora_b + F.pad(_in_rows(rows, site), (*columns, 0, 0))
            first += rank
        return lora_b

    def _beside(self, x: Tensor, sites: list) -> Tensor:
        """Add each part's update, of its own dropped input, to the output of the projection."""
        layer = self.frozen.bare
        for rows, site in sites:
            layer = partial(site.beside, layer, lora_b=_in_rows(rows, site))
        return layer(x)


def _in_rows(rows: Rows, site) -> Tensor:
    """One scaled second factor (N, R), zero outside its part's rows."""
    return rows.among_zeros(site.scale * site.lora_b)
