"""Parameter counts equal the paper's formulas (appendix B), on the real shapes."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import pelt_fast

L, D_BART, D_ROBERTA = 12, 1024, 768

# attention and FFN sub-layers: 3 and 2 a layer in BART and mBART, 1 and 1 in RoBERTa
FORMULAS = {
    "prompt": lambda d, attention, ffn: 200 * d,
    "prefix": lambda d, attention, ffn: 2 * 200 * d * attention * L,
    "prefix_ungated": lambda d, attention, ffn: 2 * 30 * d * attention * L,
    "prefix_nomlp": lambda d, attention, ffn: 2 * 200 * d * attention * L,
    "lora": lambda d, attention, ffn: 4 * 16 * d * attention * L,
    "lora_ffn": lambda d, attention, ffn: 10 * 102 * d * ffn * L,
    "houlsby": lambda d, attention, ffn: 2 * 200 * d * (attention + ffn) * L,
    "pfeiffer": lambda d, attention, ffn: 2 * 600 * d * ffn * L,
    "parallel_adapter_attn": lambda d, attention, ffn: 2 * 200 * d * attention * L,
    "parallel_adapter_ffn": lambda d, attention, ffn: 2 * 1024 * d * ffn * L,
    "multi_head_parallel_adapter": lambda d, attention, ffn: 2 * 200 * d * attention * L,
    "scaled_parallel_adapter": lambda d, attention, ffn: 2 * 512 * d * ffn * L,
    "learned_scale_parallel_adapter": lambda d, attention, ffn: 2 * 512 * d * ffn * L,
    "parallel_attn_parallel_ffn": lambda d, attention, ffn: (60 * attention + 1024 * ffn) * d * L,
    "prefix_lora_ffn": lambda d, attention, ffn: (60 * attention + 1020 * ffn) * d * L,
    "mam": lambda d, attention, ffn: (2 * 30 * attention + 2 * 512 * ffn) * d * L,
    "mam_glue": lambda d, attention, ffn: (2 * 16 * attention + 2 * 16 * ffn) * d * L,
}
# appendix B of the paper (docs/maths.md#parameter-counts): the figures the paper and its users print
PRINTED = {
    "prefix": 14_745_600, "prefix_ungated": 2_211_840, "scaled_parallel_adapter": 25_165_824,
    "mam": 27_377_664,
}  # fmt: skip
# and the shares it prints, in percent, of BART-large
SHARES = {
    "bitfit": 0.1, "prompt": 0.1, "prefix": 3.6, "pfeiffer": 7.2, "lora_ffn": 6.1,
    "parallel_adapter_ffn": 12.3, "parallel_adapter_attn": 3.6,
    "multi_head_parallel_adapter": 3.6, "parallel_attn_parallel_ffn": 6.7,
    "prefix_lora_ffn": 6.7, "mam": 6.7,
}  # fmt: skip


def bart_large():
    with torch.device("meta"):
        return BartForConditionalGeneration(BartConfig())


def mbart_large():
    with torch.device("meta"):
        return MBartForConditionalGeneration(MBartConfig(vocab_size=250_027))


def roberta_base():
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    with torch.device("meta"):
        return RobertaForSequenceClassification(config)


@pytest.mark.parametrize("method", FORMULAS)
def test_bart_large(method):
    count = pelt_fast.count_parameters(pelt_fast.inject(bart_large(), method))
    assert count.paper == FORMULAS[method](D_BART, 3, 2)
    assert count.paper == PRINTED.get(method, count.paper)
    assert 406e6 < count.base < 407e6


@pytest.mark.parametrize("method", FORMULAS)
def test_mbart_large(method):
    count = pelt_fast.count_parameters(pelt_fast.inject(mbart_large(), method))
    assert count.paper == FORMULAS[method](D_BART, 3, 2)
    assert 610e6 < count.base < 612e6


def test_every_preset_has_its_formula():
    assert pelt_fast.methods().keys() - FORMULAS.keys() == {"full", "linear_probe", "bitfit"}


@pytest.mark.parametrize("method", SHARES)
def test_the_papers_share_of_bart_large(method):
    # the authors divided by the 406 M of BART-large
    count = pelt_fast.count_parameters(pelt_fast.inject(bart_large(), method))
    assert abs(count.percent - SHARES[method]) < 0.1, count.percent


def test_bitfit_counts_the_bias_vectors():
    for model in (bart_large(), roberta_base(), mbart_large()):
        base = model.base_model
        biases = sum(p.numel() for n, p in base.named_parameters() if n.endswith(".bias"))
        count = pelt_fast.count_parameters(pelt_fast.inject(model, "bitfit"))
        assert count.paper == count.kept == biases == count.trainable - count.head


@pytest.mark.parametrize("method", FORMULAS)
def test_roberta_base(method):
    model = pelt_fast.inject(roberta_base(), method)
    count = pelt_fast.count_parameters(model)
    assert count.paper == FORMULAS[method](D_ROBERTA, 1, 1)
    head = sum(p.numel() for n, p in model.named_parameters() if n.startswith("classifier"))
    assert count.head == head == 592_130


def test_mam_on_bart_large_is_the_papers_share_and_its_codes_trainable_tensors():
    count = pelt_fast.count_parameters(pelt_fast.inject(bart_large(), "mam"))
    assert round(count.percent, 1) == 6.7
    biases = 24 * (512 + 1024)
    assert count.kept == count.paper + biases
    assert count.trainable == 3 * 20_536_096 + 25_165_824 + biases  # the prefix MLPs train


def test_mam_glue_on_roberta_base_is_half_a_percent_and_one_prefix_mlp():
    count = pelt_fast.count_parameters(pelt_fast.inject(roberta_base(), "mam_glue"))
    assert 0.4 < count.percent < 0.6
    adapters = 12 * (2 * 16 * 768 + 16 + 768)
    assert count.trainable - count.head == 15_391_520 + adapters  # [I#15] counted three MLPs


def test_full_counts_everything():
    count = pelt_fast.count_parameters(pelt_fast.inject(roberta_base(), "full"))
    assert count.paper == count.trainable == count.base
