"""TRL's SFTTrainer on an injected model: it trains, packed without padding too, the base untouched."""

import copy

import pytest
import torch
from datasets import Dataset

import pelt_fast
from pelt_fast.injection.count import is_method
from tests.models.test_parity import small_method
from tests.small import MODELS, VOCABULARY, randomise

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


def preferences() -> Dataset:
    return Dataset.from_dict(
        dict(prompt=["w5 w6 "] * 12, chosen=["w7 w8"] * 12, rejected=["w9 w4"] * 12)
    )


def dpo_losses(model, reference, folder) -> list[float]:
    arguments = trl.DPOConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        logging_steps=1, report_to=[], save_strategy="no", bf16=False, disable_tqdm=True,
        use_cpu=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=model, ref_model=reference, args=arguments, train_dataset=preferences(),
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_dpo_with_the_base_as_its_reference_is_dpo_with_a_second_model(tmp_path):
    torch.manual_seed(0)
    model = randomise(pelt_fast.inject(MODELS["llama"](), small_method("lora", dropout=0.0)))
    twin = copy.deepcopy(model)
    second = pelt_fast.eject(copy.deepcopy(model))
    losses = dpo_losses(model, pelt_fast.reference_model(model), tmp_path / "shared")
    assert losses == dpo_losses(twin, second, tmp_path / "second")
    assert losses[-1] < losses[0]


def test_a_reference_model_leaves_its_model_as_it_is():
    model = randomise(pelt_fast.inject(MODELS["bart"](), small_method("mam"))).train()
    batch = dict(input_ids=torch.tensor([[5, 6, 7]]), decoder_input_ids=torch.tensor([[2, 8]]))
    reference = pelt_fast.reference_model(model)
    trainable = [p.requires_grad for p in model.parameters()]
    assert reference.eval() is reference and reference.requires_grad_(False) is reference
    assert [p.requires_grad for p in model.parameters()] == trainable and model.model.training
    model.eval()
    own = model(**batch).logits
    plain = pelt_fast.eject(copy.deepcopy(model))
    base = plain(**batch).logits
    assert torch.equal(reference(**batch).logits, base) and isinstance(reference, type(model))
    ids = batch["input_ids"]
    assert torch.equal(
        reference.generate(ids, max_new_tokens=6), plain.generate(ids, max_new_tokens=6)
    )
    assert torch.equal(model(**batch).logits, own)
    with pytest.raises(ValueError, match="nothing is injected"):
        pelt_fast.reference_model(MODELS["bart"]())
