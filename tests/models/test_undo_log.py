"""The undo log: each kind of change is made, told, and taken back, the last one first."""

import copy
import pickle

import torch
from torch import nn

from pelt_fast.injection.undo_log import UndoLog
from pelt_fast.modules.late import Taken


class Layer(nn.Module):
    """Something with a child, a probability and an attribute."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout, self.scale = nn.Linear(2, 2), 0.5, 3.0

    def forward(self, x):
        return self.linear(x)


def identity(x):
    return x


def changed() -> tuple[Layer, UndoLog]:
    """A layer with one change of each kind, and its log as a part of it."""
    layer, log = Layer(), UndoLog()
    log.call(layer.linear, identity)
    log.take(Taken(layer, "dropout"))
    log.set(layer, "scale", 4.0)
    log.set(layer, "note", "ours", watched=False)
    log.add(layer, "pelt_child", nn.Linear(1, 1))
    log.hook(layer.register_forward_pre_hook(lambda *_: None))
    return layer, log


def state(layer: nn.Module) -> tuple:
    attributes = {n: v for n, v in vars(layer).items() if isinstance(v, (int, float, str))}
    return attributes, set(layer._modules), len(layer._forward_pre_hooks), vars(layer.linear).keys()


def test_every_change_is_taken_back():
    layer, log = changed()
    assert layer.dropout is False and layer.scale == 4.0 and "pelt_child" in layer._modules
    assert torch.equal(layer(torch.ones(1, 2)), torch.ones(1, 2))
    log.undo()
    assert state(layer) == state(Layer())
    log.undo()  # nothing is left to take back
    assert state(layer) == state(Layer())


def test_the_last_change_is_taken_back_first():
    layer, log = Layer(), UndoLog()
    for value in (4.0, 5.0, 6.0):
        log.set(layer, "scale", value)
    log.undo()
    assert layer.scale == 3.0


def test_an_unwatched_attribute_that_others_changed_stays():
    layer, log = changed()
    layer.note = "theirs"
    log.undo()
    assert layer.note == "theirs"


def test_it_tells_what_must_stay():
    layer, log = changed()
    assert log.forwards() == {layer.linear: identity}
    assert log.attributes() == {(layer, "scale"): 4.0}
    assert log.children() == {(layer, "pelt_child"): layer.pelt_child}
    assert log.hooked(layer) == [layer]


def test_a_copy_takes_back_the_copy_s_changes():
    layer, log = Layer(), UndoLog()
    log.call(layer.linear, identity)
    log.set(layer, "scale", 4.0)
    layer.log = log
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        again.log.undo()
        assert again.scale == 3.0 and "forward" not in vars(again.linear)
    assert layer.scale == 4.0 and "forward" in vars(layer.linear)
