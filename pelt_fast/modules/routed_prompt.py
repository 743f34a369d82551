"""The prompts of several methods in front of one stack: each row of a batch has its method's."""

import torch
from torch import Tensor

from .methods import Methods
from .prompt import Prompt
from .routing import Routes


class RoutedPrompt(Methods):
    """A :class:`.Prompt` for each method that has one, by its name."""

    def now(self, length: int | None = None) -> "Prompt | MixedPrompt | None":
        """What acts in this forward: the prompt of the one method of all rows, as it acts alone;
        those of several methods; or None.

        Args:
            length: how many virtual tokens there are in front of what this forward goes on from (a
                cache, or the encoder's outputs), where the prompts of several methods made it.
        """
        if self.switch.any_block and self.switch.is_off():
            return None
        routes = self.routing.now()
        if routes.alone is not None and length is None:
            found = self.of(routes.alone)
        else:
            found = self._mixed(routes, length)
        if found is None or not found.length:
            return None
        if routes.lengths is not None and routes.lengths.numel() > 1:
            raise ValueError(
                "prompt tuning cannot take packed sequences (a prompt goes in front of a row), and"
                " route was given their lengths, with a method that has a prompt: pad them, or use"
                " a prefix, which each of them sees"
            )
        return found

    def _mixed(self, routes: Routes, length: int | None) -> "MixedPrompt":
        sites, present = dict(self.acting(routes)), routes.present
        some_without = present is None or not present <= sites.keys()
        return MixedPrompt(sites, some_without, self.routing.count, routes, length)


class MixedPrompt:
    """The virtual tokens in front of a batch whose rows are under several methods.

    There are ``length`` of them in front of every row: as many as the longest prompt has. A row
    with a shorter prompt, or with none, has its own right in front of its tokens, and zeros in
    front of those, which a padding mask hides.

    Args:
        prompts: the prompt of each method that rows may be under.
        some_without: whether a row may be under a method without a prompt, or under none.
        count: the number of methods.
        routes: the method of each row.
        length: the number of virtual tokens where it is given; None: of the longest prompt.
    """

    def __init__(
        self,
        prompts: dict[int, Prompt],
        some_without: bool,
        count: int,
        routes: Routes,
        length: int | None = None,
    ):
        self.prompts, self.count, self.routes = prompts, count, routes
        lengths = {prompt.length for prompt in prompts.values()} | ({0} if some_without else set())
        self.lengths = sorted(lengths)  # that rows may have
        self.length = self.lengths[-1] if length is None else length

    @property
    def hides(self) -> bool:
        """Whether a row may see fewer virtual tokens than there are."""
        return self.lengths != [self.length]

    @property
    def embeddings(self) -> dict[int | None, Tensor]:
        """The embeddings of the methods that rows may be under."""
        return {method: prompt.embedding for method, prompt in self.prompts.items()}

    def methods(self, rows: int, device: torch.device) -> Tensor | None:
        """The method of each row."""
        return self.routes.of(rows, device)

    def visible(self, mask: Tensor) -> Tensor:
        """The columns (B, P) of the virtual tokens in a padding mask (B, T), in its dtype."""
        seen = {method: mask.new_ones(prompt.length) for method, prompt in self.prompts.items()}
        return self._of_rows(seen, mask.new_zeros(self.length), mask)

    def __call__(self, x: Tensor) -> Tensor:
        """[prompts; x] for x (B, T, d), in x's dtype."""
        own = {method: prompt.embedding.to(x.dtype) for method, prompt in self.prompts.items()}
        return torch.cat([self._of_rows(own, x.new_zeros(self.length, x.shape[-1]), x), x], 1)

    def _of_rows(self, own: dict[int, Tensor], nothing: Tensor, x: Tensor) -> Tensor:
        """What the method of each row of ``x`` has of its own, behind the zeros ``nothing`` that
        fill it up to P; zeros alone where it has nothing. The last entry is that of no method."""
        each = [nothing] * (self.count + 1)
        for method, values in own.items():
            each[method] = torch.cat([nothing[len(values) :], values])
        return torch.stack(each)[self.routes.of(x.shape[0], x.device)]
