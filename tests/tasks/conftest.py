"""Small real models and tokenizers as folders, and the hand-written samples of the four tasks."""

from pathlib import Path

import pytest
import torch

from pelt_fast.tasks import small_base
from tests.small import bart, roberta

SAMPLES = Path(__file__).with_name("samples")


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    """A model's folder for each task."""
    folder = tmp_path_factory.mktemp("models")
    texts = [line for path in SAMPLES.rglob("*.*") for line in path.read_text().splitlines()]
    torch.manual_seed(0)
    tokenizer = small_base.tokenizer_of(texts, folder / "encoder")
    tokenizer.save_pretrained(folder / "seq2seq")
    size = dict(vocab_size=len(tokenizer), max_position_embeddings=130)
    roberta(num_labels=2, **size).save_pretrained(folder / "encoder")
    bart(dropout=0.0, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
         forced_eos_token_id=2, **size).save_pretrained(folder / "seq2seq")  # fmt: skip
    encoder, seq2seq = str(folder / "encoder"), str(folder / "seq2seq")
    return {"sst2": encoder, "mnli": encoder, "xsum": seq2seq, "wmt16": seq2seq}
