"""Where each of several methods stands in its training: its gradients, losses and its end."""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pelt_fast.formats.checkpoint import save
from pelt_fast.injection.method_names import parameters_of_method

from .runs import MethodResult, MethodRun

STATE_FILE = "pelt_several.json"

logger = logging.getLogger("pelt_fast")


class TrainedMethod:
    """One method, its run, and what came of it so far."""

    def __init__(self, model: nn.Module, name: str, run: MethodRun):
        self.model, self.name, self.run = model, name, run
        self.losses: list[float] = []
        self.stopped: str | None = None
        self.folder: Path | None = None
        named = parameters_of_method(model, name)
        self.parameters = {n: p for n, p in named.items() if p.requires_grad}
        self._before: list[Tensor] = []  # the parameters before the last step

    @property
    def trains(self) -> bool:
        """Whether the next step has rows of this method."""
        return self.stopped is None and len(self.losses) < self.run.steps

    def forget_gradients(self) -> None:
        """Without gradients the optimizer leaves the method as it is: no decay, no momentum."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient."""
        return get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    def ready(self, loss: float, norm: float, clip: Tensor) -> None:
        """Make the method ready for the optimizer's step, or stop it because of this step. ``clip``
        is ``norm`` on the device."""
        reason = self._why_stop(loss, norm)
        if reason is not None:
            self._stop(reason)
            return
        self.losses.append(loss)
        self._keep()
        if self.run.max_grad_norm:
            clip_grads_with_norm_(self.parameters.values(), self.run.max_grad_norm, clip)

    def end(self) -> None:
        """Save the method if it has taken its last step now."""
        if self.stopped is not None or self.trains or self.folder is not None:
            return
        if not self._is_finite():
            self._stop()
        elif self.run.folder is not None:
            save(self.model, self.run.folder, method=self.name, include_trained=False)
            self.folder = Path(self.run.folder)

    def result(self) -> MethodResult:
        """What came of the run."""
        return MethodResult(len(self.losses), self.losses, self.stopped, self.folder)

    def state(self) -> dict:
        """What a checkpoint keeps beside the tensors."""
        folder = None if self.folder is None else str(self.folder)
        return {"losses": self.losses, "stopped": self.stopped, "folder": folder}

    def restore(self, state: dict) -> None:
        """Stand where a checkpoint was written."""
        self.losses, self.stopped = state["losses"], state["stopped"]
        self.folder = None if state["folder"] is None else Path(state["folder"])

    def _why_stop(self, loss: float, norm: float) -> str | None:
        step, most = len(self.losses) + 1, self.run.stop_above
        if not math.isfinite(loss):
            return f"the loss of step {step} was {loss}"
        if most is not None and loss > most:
            return f"the loss of step {step} was {loss:.6g}, above stop_above={most:g}"
        if not math.isfinite(norm):
            return f"the norm of the gradient of step {step} was {norm}"
        return None

    @torch.no_grad()
    def _keep(self) -> None:
        own = list(self.parameters.values())
        if not self._before:
            self._before = [torch.empty_like(p) for p in own]
        torch._foreach_copy_(self._before, own)

    @torch.no_grad()
    def _stop(self, reason: str = "") -> None:
        """Stop with the parameters from before the step that broke. If they are not finite, the
        step that broke is the one that made them."""
        if self._before and not self._is_finite():
            reason = f"step {len(self.losses)} made parameters that are not finite"
            torch._foreach_copy_(list(self.parameters.values()), self._before)
            self.losses.pop()
        self.stopped = reason
        self.forget_gradients()
        logger.warning("train_several stopped the method %r: %s", self.name, reason)

    def _is_finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.parameters.values())


class TrainedMethods:
    """All methods of a training, by name."""

    def __init__(self, model: nn.Module, runs: dict[str, MethodRun]):
        self.by_name = {name: TrainedMethod(model, name, run) for name, run in runs.items()}

    def __iter__(self) -> Iterator[TrainedMethod]:
        return iter(self.by_name.values())

    def ready(self, losses: dict[str, Tensor]) -> None:
        """Behind the backward of a step with these losses: what goes on is clipped, what broke is
        stopped, and the others have no gradient. The host waits for the device once."""
        for method in self:
            if method.name not in losses:
                method.forget_gradients()
        norms = {name: self.by_name[name].gradient_norm() for name in losses}
        pairs = [torch.stack([losses[n].double(), norms[n].to(losses[n]).double()]) for n in losses]
        for name, (loss, norm) in zip(losses, torch.stack(pairs).tolist()):
            self.by_name[name].ready(loss, norm, norms[name])

    def end_step(self) -> bool:
        """Behind the optimizer's step: save what has ended. Whether any method goes on."""
        for method in self:
            method.end()
        return any(method.trains for method in self)

    def results(self) -> dict[str, MethodResult]:
        """What came of each run."""
        return {name: method.result() for name, method in self.by_name.items()}

    def save(self, folder: Path) -> None:
        """Write into a checkpoint where each method stands."""
        states = {name: method.state() for name, method in self.by_name.items()}
        (folder / STATE_FILE).write_text(json.dumps(states))

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote; ValueError if it is of other methods."""
        path = folder / STATE_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no checkpoint of train_several: no {STATE_FILE}")
        states = json.loads(path.read_text())
        if states.keys() != self.by_name.keys():
            raise ValueError(
                f"{folder} is a checkpoint of {', '.join(states)}; runs has"
                f" {', '.join(self.by_name)}"
            )
        for name, method in self.by_name.items():
            method.restore(states[name])
