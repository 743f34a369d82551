"""Which base a method belongs to: the names and shapes of the base's weights.

They are those of the plain model: without quantisation, wrappers, ties or PEFT's layers.
"""

import hashlib

from torch import nn

from pelt_fast.layouts.lookup import base_of
from pelt_fast.layouts.names import clean, is_method, parameters_of, unwrapped
from pelt_fast.modules.projection_view import is_linear


def identity(model: nn.Module) -> tuple[str, str]:
    """The architecture of a base and its name, as they are saved. A model that is not transformers'
    has the name of its class."""
    base = base_of(unwrapped(model))
    config = getattr(base, "config", None)
    architecture = getattr(config, "model_type", None) or type(base).__name__
    return architecture, getattr(config, "_name_or_path", "")


def fingerprint(model: nn.Module) -> str:
    """A digest of the names and logical shapes of the base's weights, not of their values. A layer
    in 4 bits has the shape of the layer that was quantised."""
    return _digest(logical_shapes(base_of(unwrapped(model))))


def fingerprints(model: nn.Module) -> set[str]:
    """Every fingerprint that a method of this model may have been saved with. Earlier versions used
    the shapes as they are stored, and a tied weight once."""
    base = base_of(unwrapped(model))
    stored = {name: tuple(p.shape) for name, p in parameters_of(base).items()}
    stored = {name: shape for name, shape in stored.items() if not is_method(name)}
    return {fingerprint(model), _digest(stored)}


def _digest(shapes: dict[str, tuple]) -> str:
    lines = sorted(f"{name} {shape}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def logical_shapes(module: nn.Module, path: str = "") -> dict[str, tuple]:
    """The shapes of a module's weights by name; a linear layer has (N, K), however it is stored."""
    for around in ("base_layer", "original_module"):  # PEFT's, around a layer
        if around in module._modules:
            return logical_shapes(module._modules[around], path)
    shapes = {}
    if is_linear(module):
        shapes[f"{path}weight"] = (module.out_features, module.in_features)
        if getattr(module, "bias", None) is not None:
            shapes[f"{path}bias"] = (module.out_features,)
    else:
        shapes |= {f"{path}{name}": tuple(p.shape)
                   for name, p in module._parameters.items() if p is not None}  # fmt: skip
    for name, child in module._modules.items():
        if child is not None and not name.startswith("pelt_"):
            shapes |= logical_shapes(child, clean(f"{path}{name}."))
    return shapes
