"""The task head is what a task adds to a base: never a part of the base."""

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)
from transformers.models.auto import modeling_auto

import pelt_fast
from pelt_fast.layouts.lookup import task_head
from tests.small import bert, t5

# kinds of task, and classes of each: enough to meet every way of laying a head out
HEADS = {
    "BertForSequenceClassification": {"classifier"},
    "CamembertForTokenClassification": {"classifier"},  # the head stands in front of the base
    "LlamaForSequenceClassification": {"score"},
    "LlamaForQuestionAnswering": {"qa_outputs"},
    "BartForSequenceClassification": {"classification_head"},
    "DistilBertForSequenceClassification": {"classifier", "pre_classifier"},
    "ModernBertForSequenceClassification": {"classifier", "head"},
    "T5ForQuestionAnswering": {"qa_outputs"},  # the model is its own base
    "T5ForSequenceClassification": {"classification_head"},
    "T5ForTokenClassification": {"classifier"},
    "SiglipForImageClassification": {"classifier"},  # and so is this
    "CLIPForImageClassification": {"classifier"},
    "ViTForImageClassification": {"classifier"},
    "DeiTForImageClassificationWithTeacher": {"cls_classifier", "distillation_classifier"},
    "DINOv3ViTForImageClassification": {"classifier"},
    "Dinov2ForImageClassification": {"classifier"},
    "Wav2Vec2ForCTC": {"lm_head"},
    "Wav2Vec2ForSequenceClassification": {"classifier", "projector"},
    "WhisperForAudioClassification": {"classifier", "projector"},
    "ParakeetForCTC": {"ctc_head"},
    "SegformerForSemanticSegmentation": {"decode_head"},
}
NONE = (
    "DINOv3ViTModel", "DINOv3ViTBackbone", "DINOv3ConvNextModel", "BeitBackbone", "SwinBackbone",
    "PixioBackbone", "BertModel", "ViTModel", "CLIPModel", "CLIPVisionModel", "T5EncoderModel",
    "LlamaForCausalLM", "BartForConditionalGeneration", "T5ForConditionalGeneration",
    "GPT2LMHeadModel", "Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration", "WhisperForConditionalGeneration",
)  # fmt: skip
TASKS = (
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION", "CTC", "BACKBONE",
)  # fmt: skip


def empty(name: str) -> nn.Module:
    """A model of transformers' with few layers and no weights."""
    kind = getattr(transformers, name)
    config = kind.config_class()
    for part in (config, *(p for p in vars(config).values() if hasattr(p, "to_dict"))):
        for field in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers"):
            if type(vars(part).get(field)) is int:
                setattr(part, field, 1)
    with torch.device("meta"):
        return kind(config)


def with_weights(model: nn.Module) -> set[str]:
    return {name for name, child in task_head(model).items() if list(child.parameters())}


@pytest.mark.parametrize("name", HEADS)
def test_a_task_has_its_head(name):
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    model = empty(name)
    found = with_weights(model)
    assert HEADS[name] <= found
    own = {n for n in found if n not in HEADS[name]}
    assert not own & {"embeddings", "encoder", "decoder", "model", "vision_model", "shared"}


@pytest.mark.parametrize("name", NONE)
def test_what_has_no_task_has_no_head(name):
    assert with_weights(empty(name)) == set()


def _classes(every: int) -> list[str]:
    names = []
    for task in TASKS:
        table = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()
        found = sorted({n for value in table for n in ([value] if type(value) is str else value)})
        names += found[::every]
    return names


@pytest.mark.parametrize("name", _classes(every=12))
def test_no_head_holds_a_part_of_the_base(name):
    try:
        model = empty(name)
    except Exception as error:
        pytest.skip(f"no model from a bare config: {type(error).__name__}")
    for child in task_head(model).values():
        kinds = (nn.Embedding, transformers.PreTrainedModel)
        assert not any(isinstance(module, kinds) for module in child.modules())
        assert sum(p.numel() for p in child.parameters()) < 0.5 * model.num_parameters()


def test_a_model_of_the_users_has_the_head_beside_its_base():
    class Mine(BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = BertModel(config)
            self.second_tower = BertModel(config)
            self.answers = nn.Linear(config.hidden_size, 2)

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=8, vocab_size=9)  # fmt: skip
    assert set(task_head(Mine(config))) == {"answers"}


def test_training_the_head_alone_needs_one():
    config = DINOv3ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=8, image_size=8, patch_size=4)  # fmt: skip
    model = DINOv3ViTModel(config)
    with pytest.raises(ValueError, match="trains the task head alone, and DINOv3ViTModel has none"):
        pelt_fast.inject(model, "linear_probe")
    assert all(p.requires_grad for p in model.parameters())
    pelt_fast.inject(bert(), "linear_probe")
    probed = pelt_fast.inject(t5(transformers.T5ForQuestionAnswering), "linear_probe")
    trained = {n.split(".")[0] for n, p in probed.named_parameters() if p.requires_grad}
    assert trained == {"qa_outputs"}
