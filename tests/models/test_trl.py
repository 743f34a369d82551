"""TRL's SFTTrainer on an injected model: it trains, packed without padding too, the base untouched."""

import pytest
import torch
from datasets import Dataset

import pelt_fast
from pelt_fast.injection.count import is_method
from tests.models.test_parity import small_method
from tests.small import MODELS, VOCABULARY

trl = pytest.importorskip("trl")


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    plain = Tokenizer(WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="w1", eos_token="w2", unk_token="w0"
    )


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (24,), generator=generator).tolist()
    draw = [torch.randint(4, 9, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row) for row in draw]})


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
@pytest.mark.parametrize("method", ["lora", "mam"])
def test_sft_trainer_trains_the_method_alone(method, padding_free, tmp_path):
    torch.manual_seed(0)
    model = pelt_fast.inject(MODELS["llama"](), small_method(method))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=6, learning_rate=1e-2,
        logging_steps=1, report_to=[], save_strategy="no", padding_free=padding_free, bf16=False,
        max_length=None if padding_free else 16, gradient_checkpointing=False, disable_tqdm=True, use_cpu=True,
        loss_type="nll",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=rows(), processing_class=tokenizer()
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        if not is_method(name):
            assert torch.equal(parameter, before[name]), name
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if is_method(n))
