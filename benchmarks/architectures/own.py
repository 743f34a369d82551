"""What the config of a family needs beside the sizes that all families have."""

from typing import Any

_HYBRID = ["linear_attention", "full_attention"]
_BERT = dict(model_type="bert", vocab_size=96, hidden_size=32, num_hidden_layers=2,
             num_attention_heads=4, intermediate_size=48)  # fmt: skip
_CROSSED = _BERT | dict(is_decoder=True, add_cross_attention=True)
_VIT = dict(model_type="vit", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, image_size=32, patch_size=8)  # fmt: skip
_WINDOWS = dict(depths=[1, 1], num_heads=[2, 4], window_size=4, embed_dim=16)


def _sections(*sections: int) -> dict[str, Any]:
    """A text config whose rotary positions have these sections."""
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=list(sections))
    return dict(text_config=dict(rope_parameters=rope))


OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": dict(layer_group_size=2),
    "bamba": dict(attn_layer_indices=[1]),
    "deepseek_v2": dict(num_experts_per_tok=2, n_routed_experts=4),
    "donut-swin": _WINDOWS,
    "encoder-decoder": dict(encoder=_BERT, decoder=_CROSSED),
    "esm": dict(vocab_size=96, pad_token_id=1, mask_token_id=2, position_embedding_type="rotary"),
    "glm46v": _sections(2, 1, 1),
    "glm4v": _sections(2, 1, 1),
    "glm4v_moe": _sections(2, 0, 0),
    "glm_ocr": _sections(2, 1, 1),
    "glmga": _sections(2, 1, 1),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "kimi_linear": dict(layer_types=_HYBRID),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "lfm3": dict(layer_types=["conv", "full_attention"]),
    "paddleocr_vl": _sections(2, 1, 1),
    "qwen2_5_omni_thinker": _sections(2, 1, 1),
    "qwen2_5_vl": _sections(2, 1, 1),
    "qwen2_vl": _sections(2, 1, 1),
    "reformer": dict(is_decoder=True, attn_layers=["local", "local"], axial_pos_embds=False),
    "swin": _WINDOWS,
    "swin2sr": _WINDOWS,
    "swinv2": _WINDOWS,
    "vision-encoder-decoder": dict(encoder=_VIT, decoder=_CROSSED),
    "wav2vec2-bert": dict(vocab_size=32),
    "wav2vec2-conformer": dict(vocab_size=32),
    "yolos": dict(image_size=[32, 32]),
    "xmod": dict(default_language="en_XX"),
    **{name: dict(layer_types=_HYBRID) for name in (
        "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
    )},
    **{name: dict(text_config=dict(layer_types=_HYBRID)) for name in (
        "qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7",
    )},
}  # fmt: skip
