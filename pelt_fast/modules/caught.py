"""The input of one module, kept for a site that reads it later in the same forward."""

from torch import Tensor, nn


class Caught:
    """Forward pre-hook (with keywords) that keeps a module's first argument until it is taken."""

    def __init__(self, keyword: str = "hidden_states"):
        self.keyword = keyword
        self.x: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.x = args[0] if args else kwargs[self.keyword]

    def take(self) -> Tensor:
        """The input of this forward, which is then let go."""
        x, self.x = self.x, None
        return x

    def __getstate__(self):
        return {**self.__dict__, "x": None}
