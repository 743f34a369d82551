"""The model that carries a method, for any handle: it may be inside or around the given model.

torch.compile, DDP, DataParallel and PEFT wrap a model in another module. A base model is inside a
model with a task head, and may be inside two. A method is on the model that inject was given,
without its wrappers, and its names are those of that model.
"""

from torch import nn

from pelt_fast.layouts.names import is_method, modules_of, unwrapped

PEFT = "_pelt_peft"  # the attribute that holds the injection of an accelerated PEFT model
METHOD = "_pelt"  # the attribute that holds a model's injection
INSIDE = "_pelt_inside"  # on parts of that model: (method's name, class of the model)


def carrier_of(handle: nn.Module) -> nn.Module:
    """The model that carries the method of ``handle``, without its wrappers.

    Raises ValueError when there is none, or when another model carries it: the message says which.
    """
    model = unwrapped(handle)
    if METHOD in model.__dict__:
        return model
    raise ValueError(
        elsewhere(model)
        or f"nothing is injected into this {type(model).__name__}: call inject first"
    )


def elsewhere(model: nn.Module) -> str | None:
    """Where the method is when ``model`` itself carries none; None when there is none."""
    kind = type(model).__name__
    for path, module in modules_of(model).items():
        if METHOD in module.__dict__:
            name, inner = module.__dict__[METHOD].config.name, type(module).__name__
            return (
                f"the method is on model.{path}: {name!r} was injected into that {inner}. Hand that"
                f" over, not the {kind} around it"
            )
        if INSIDE in module.__dict__:
            name, outer = module.__dict__[INSIDE]
            where = f" that shares model.{path}" if path else f" around this {kind}"
            return f"the method is on the {outer}{where}: {name!r} was injected into that one"
    return None


def refuse_second(model: nn.Module) -> None:
    """ValueError when any part of a model carries a method already: which one, and where."""
    for path, module in modules_of(model).items():
        part = f"this {type(model).__name__}"
        part = f"model.{path} of {part}" if path else part
        if METHOD in module.__dict__:
            present = module.__dict__[METHOD].config.name
            last = "eject it first" if not path else f"eject it there first (eject(model.{path}))"
            raise ValueError(f"{part} already carries {present!r}: {last}")
        if INSIDE in module.__dict__:
            present, outer = module.__dict__[INSIDE]
            how = "shares it" if path else "is around it"
            raise ValueError(
                f"{part} already carries {present!r}, injected into the {outer} that {how}: eject"
                " it there first"
            )
        if is_method(path) or "pelt_prefix_slice" in module.__dict__:
            raise ValueError(
                f"{part} already carries a method, injected into another model that shares it:"
                " eject it there first"
            )


def mark(model: nn.Module, parts: list[nn.Module], injection) -> None:
    """Note on the parts of a model that can be handles which model is around them."""
    for part in dict.fromkeys(parts):
        if part is not model:
            inside = injection.config.name, type(model).__name__
            injection.changes.set(part, INSIDE, inside, watched=False)
