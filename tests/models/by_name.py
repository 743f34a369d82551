"""LoRA by name: models to test it on, with a row and without one, and what they give."""

import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.models.test_parity import assert_close
from tests.small import bert, gpt2, llama


class Block(nn.Module):
    """A model of a user's own: it has no config, and no row."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.gate = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width, bias=False)
        self.down, self.norm = Conv1D(width, 3 * width), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.down(torch.sigmoid(self.gate(self.norm(x))) * self.up(self.norm(x)))


class Own(nn.Module):
    def __init__(self, width: int = 20):
        super().__init__()
        self.embed, self.patch = nn.Embedding(30, width), nn.Conv2d(3, width, 1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.mixer = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.mixer(x, x, x)[0] + x)


def neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, hidden_dropout=0.0, attention_dropout=0.0,
    ))  # fmt: skip


MAKERS = {"llama": llama, "neox": neox, "own": Own, "gpt2": lambda: gpt2(dropout=0.0),
          "bert": lambda: bert(dropout=0.0)}  # fmt: skip


def loss_of(model):
    """A scalar of a seeded batch."""
    torch.manual_seed(5)
    ids = torch.randint(4, 30, (2, 7))
    out = model(input_ids=ids).logits if hasattr(model, "config") else model(ids)
    return out.detach(), (out * torch.randn_like(out)).sum()


def sites_of(model) -> dict:
    return {site.name: site.module for site in model._pelt.sites}


def assert_same(out, wanted):
    """Two outputs are equal but for rounding."""
    assert_close({"output": out}, {"output": wanted})
