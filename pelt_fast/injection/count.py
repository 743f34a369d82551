"""How many parameters a method has: counted as in the paper, trained, and saved."""

from dataclasses import dataclass

from torch import nn

from pelt_fast.layouts.names import is_method, parameters_of
from pelt_fast.modules import PrefixBank

from .handles import carrier_of
from .record import injection_of

_MATRICES = ("lora_a", "lora_b", "down_weight", "up_weight", "embedding")


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of an injected model.

    Args:
        paper: the method's matrices, as the paper's appendix B counts: no biases, LayerNorms, task
            head or prefix MLP.
        kept: the method after training, without the prefix MLP.
        trainable: the parameters that have a gradient now, with the task head.
        head: the task head.
        base: the frozen model.
    """

    paper: int
    kept: int
    trainable: int
    head: int
    base: int

    @property
    def percent(self) -> float:
        """``paper`` as a percentage of the base."""
        return 100 * self.paper / self.base


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of an injected model.

    Args:
        model: a model with a method, or a wrapper of one.

    Returns:
        A :class:`ParameterCount`: ``paper``, ``kept``, ``trainable``, ``head`` and ``base``, and
        ``percent``, which is ``paper`` as a percentage of the base.

    Raises:
        ValueError: nothing is injected.

    Example:
        pelt_fast.inject(model, "mam")
        print(pelt_fast.count_parameters(model).percent)
    """
    model = carrier_of(model)
    injection = injection_of(model)
    named = parameters_of(model)
    base = sum(p.numel() for name, p in named.items() if not is_method(name))
    trainable = sum(p.numel() for p in named.values() if p.requires_grad)
    head = sum(named[name].numel() for name in injection.head)
    if injection.config.is_full:
        return ParameterCount(base, base, trainable, head, base)
    paper = kept = sum(named[name].numel() for name in injection.biases)
    for module in method_modules(model):
        if isinstance(module, PrefixBank):
            layers, two, heads, size, head_dim = module.shape
            values = layers * two * heads * size * head_dim
            paper, kept = paper + values, kept + values
            continue
        for name, parameter in module.named_parameters():
            kept += parameter.numel()
            paper += parameter.numel() if name in _MATRICES else 0
    return ParameterCount(paper, kept, trainable, head, base)


def method_modules(model: nn.Module) -> list[nn.Module]:
    """The injected modules, each once."""
    return list(dict.fromkeys(site.module for site in injection_of(model).sites))
