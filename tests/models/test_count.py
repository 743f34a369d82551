"""Parameter counts equal the paper's formulas (appendix B), on the real shapes."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import pelt_fast

L, D_BART, D_ROBERTA = 12, 1024, 768

# attention and FFN sub-layers: 3 and 2 a layer in BART, 1 and 1 in RoBERTa
FORMULAS = {
    "lora": lambda d, attention, ffn: 4 * 16 * d * attention * L,
    "lora_ffn": lambda d, attention, ffn: 10 * 102 * d * ffn * L,
    "prefix": lambda d, attention, ffn: 2 * 200 * d * attention * L,
    "houlsby": lambda d, attention, ffn: 2 * 200 * d * (attention + ffn) * L,
    "scaled_parallel_adapter": lambda d, attention, ffn: 2 * 512 * d * ffn * L,
    "mam": lambda d, attention, ffn: (2 * 30 * attention + 2 * 512 * ffn) * d * L,
    "mam_glue": lambda d, attention, ffn: (2 * 16 * attention + 2 * 16 * ffn) * d * L,
}
# PAPER 1.4 and 3.4: the figures the paper and its users print
PRINTED = {"prefix": 14_745_600, "scaled_parallel_adapter": 25_165_824, "mam": 27_377_664}


def bart_large():
    with torch.device("meta"):
        return BartForConditionalGeneration(BartConfig())


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
