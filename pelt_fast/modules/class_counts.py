"""Task heads of methods with other numbers of classes, for the rows of one batch."""

import torch
from torch import Tensor, nn

from .routing import Routing
from .switch import Switch


class ClassCounts:
    """The number of classes of each method that has another one than the model.

    Where rows have unlike numbers, the head gives all of them the largest, with -inf in place of
    the classes that a row does not have; the model then returns a list.
    """

    def __init__(self, routing: Routing, switch: Switch, usual: int | None):
        self.routing, self.switch, self.usual = routing, switch, usual
        self.by_method: dict[int, int] = {}

    def refuse_labels(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook (with keywords): the model's own loss is for its own number alone."""
        if not self._asked() or kwargs.get("labels") is None:
            return
        present = self.routing.now().present
        found = {n for method, n in self.by_method.items() if present is None or method in present}
        if found:
            raise ValueError(
                f"labels: rows are under methods with {', '.join(map(str, sorted(found)))} classes,"
                f" and the loss of {type(module).__name__} is that of {self.usual}: leave labels"
                " out, and take the loss of each row from its logits"
            )

    def split(self, module: nn.Module, args: tuple, output):
        """Forward hook: logits without the classes that a row does not have; a list with an entry
        for each row, if the rows have unlike numbers."""
        if not self._asked():
            return output
        logits = output[0] if isinstance(output, tuple) else output.logits
        found = self._of_rows(logits)
        if isinstance(output, tuple):
            return (found, *output[1:])
        output.logits = found
        return output

    def _of_rows(self, logits: Tensor) -> Tensor | list[Tensor]:
        methods = self.routing.now().of(logits.shape[0], torch.device("cpu")).tolist()
        counts = [self.by_method.get(method, self.usual) for method in methods]
        if len(set(counts)) == 1:
            return logits[..., : counts[0]]
        return [row[..., :count] for row, count in zip(logits, counts)]

    def _asked(self) -> bool:
        if not self.by_method or torch.compiler.is_compiling():
            return False
        return not (self.switch.any_block and self.switch.is_off())
