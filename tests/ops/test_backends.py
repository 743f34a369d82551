"""The backend in force: each thread's own, the process's until it chooses, and seen by guards."""

import os
import subprocess
import sys

import pytest
import torch

import pelt_fast
from pelt_fast import functional
from pelt_fast.ops.common.backends import active_backend
from pelt_fast.ops.lora.op import lora_fwd
from tests.threads import in_a_thread

M, K, N, R = 5, 8, 6, 2


def test_a_choice_is_the_thread_s_own():
    def chooses():
        before = active_backend()
        pelt_fast.backend("auto")
        with pelt_fast.backend("reference"):
            inside = active_backend()
        return before, inside, active_backend()

    with pelt_fast.backend("reference"):
        assert in_a_thread(chooses) == ("auto", "reference", "auto")
        assert active_backend() == "reference"


def test_leaving_restores_what_was_there_also_nested_raised_and_again():
    again = pelt_fast.backend("reference")
    with pytest.raises(KeyError), pelt_fast.backend("auto"):
        with again:
            assert active_backend() == "reference"
        assert active_backend() == "auto"
        raise KeyError
    assert active_backend() == "reference"
    again.__exit__()
    assert active_backend() == "auto"


@pytest.fixture
def referenced(monkeypatch):
    """The number of times the reference of a LoRA forward ran, in a list."""
    count, own = [], lora_fwd.reference
    monkeypatch.setattr(lora_fwd, "reference", lambda *args: count.append(1) or own(*args))
    return count


def lora():
    return functional.lora_linear(
        torch.ones(M, K), torch.ones(N, K), None, torch.ones(R, K), torch.ones(N, R), scale=1.0
    )


def test_threads_run_the_backend_they_chose(referenced):
    with pelt_fast.backend("reference"):
        in_a_thread(lora)
        assert not referenced
        lora()
        assert referenced == [1]


def test_a_compiled_function_follows_the_thread_s_backend():
    torch._dynamo.reset()
    graphs, ran = [], []

    def keeping(graph, example_inputs):
        ops = any("pelt_fast" in str(node.target) for node in graph.graph.nodes)
        graphs.append(ops)
        return lambda *args: ran.append(ops) or graph.forward(*args)

    compiled = torch.compile(lora, backend=keeping, fullgraph=True)
    expected = lora()
    with pelt_fast.backend("reference"):
        assert torch.allclose(compiled(), expected)
        in_a_thread(compiled)
        compiled()
    compiled()
    assert ran == [False, True, False, True]  # the reference is traced through, an op is one node
    assert graphs == [False, True]


def process(name: str, code: str):
    environment = {**os.environ, "PELT_FAST_BACKEND": name, "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                          text=True)  # fmt: skip


def test_the_environment_chooses_for_every_thread():
    code = """
import threading, pelt_fast
from pelt_fast.ops.common.backends import active_backend
thread = threading.Thread(target=lambda: print(active_backend()))
thread.start()
thread.join()
with pelt_fast.backend("auto"): print(active_backend())
print(active_backend())
"""
    assert process("reference", code).stdout.split() == ["reference", "auto", "reference"]


@pytest.mark.parametrize("name, message", [
    ("tritn", "ValueError: PELT_FAST_BACKEND must be one of ('auto', 'reference',"),
    ("cuda", "RuntimeError: PELT_FAST_BACKEND 'cuda' cannot run here"),
])  # fmt: skip
def test_the_environment_is_checked(name, message):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert message in process(name, "import pelt_fast").stderr
