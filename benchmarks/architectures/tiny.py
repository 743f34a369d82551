"""A tiny model with random weights of any family of transformers, made from its config class."""

import dataclasses
import itertools
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

from .own import OWN

VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 96, 32, 48, 2, 4

# the first of these mappings that knows a family gives its class
TASKS = {
    "speech": ("SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION"),
    "text": ("SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "MASKED_LM", "TEXT_ENCODING"),
    "text with images or sound": ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"),
    "vision": ("IMAGE_CLASSIFICATION", "IMAGE", "VIDEO_CLASSIFICATION"),
}

_SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (WIDTH, ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size",
            "word_embed_proj_dim", "projection_dim", "text_embed_dim", "emb_dim", "model_dim",
            "encoder_hidden_size", "decoder_hidden_size", "out_hidden_size", "output_dim",
            "embedding_dim", "cross_attention_hidden_size", "text_hidden_size", "bottleneck_size",
            "per_layer_input_hidden_size", "hidden_size_per_layer_input", "lru_width",
            "shared_qk_dim", "conv_dim_")),
    (INNER, ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "dim_ff",
            "decoder_ffn_dim", "hidden_dim", "mlp_dim", "ffn_hidden_size", "ffn_intermediate_size",
            "d_inner", "dense_intermediate_size", "intermediate_size_mlp", "encoder_hidden_dim",
            "shared_intermediate_size", "decoder_intermediate_size", "encoder_intermediate_size",
            "inner_hidden_size", "intermediate_dim")),
    (24, ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
         "moe_shared_expert_intermediate_size", "expert_dim")),
    (LAYERS, ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "depth",
             "decoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks",
             "encoder_num_layers", "decoder_num_layers", "encoder_num_hidden_layers",
             "decoder_num_hidden_layers", "num_hidden_layers_encoder", "mlp_num_layers",
             "n_encoder_layers", "e_layers")),
    (HEADS, ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
            "decoder_attention_heads", "attention_heads", "encoder_num_attention_heads",
            "decoder_num_attention_heads", "num_encoder_attention_heads",
            "num_decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts",
            "moe_num_experts", "mamba_num_heads", "mamba_n_heads", "linear_num_value_heads",
            "linear_num_key_heads", "n_group_", "num_cross_attention_heads",
            "num_self_attention_heads", "index_n_heads")),
    (2, ("num_key_value_heads", "num_experts_per_tok", "num_experts_per_token", "moe_topk",
        "moe_top_k", "moe_k", "num_frames", "top_k_experts", "decoder_num_key_value_heads",
        "n_kv_heads", "encoder_num_key_value_heads", "num_kv_heads", "cross_num_key_value_heads")),
    (1, ("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts",
        "num_shared_experts", "num_dense_layers", "mamba_n_groups", "moe_num_shared_experts")),
    (8, ("head_dim", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_channels",
        "attention_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_head",
        "mamba_head_dim", "global_head_dim", "index_head_dim", "rotary_dim", "d_head",
        "cross_head_dim", "mamba_d_state", "state_size", "ssm_state_size", "index_topk",
        "num_latents", "num_queries", "num_query_tokens", "chunk_size", "mamba_chunk_size",
        "num_mel_bins_", "patch_size", "window_size", "sliding_window", "block_size",
        "query_pre_attn_scalar", "attention_window_size")),
    (16, ("q_lora_rank", "kv_lora_rank", "max_source_positions", "num_mel_bins", "time_step_rank")),
    (32, ("image_size", "img_size", "crop_size", "max_2d_position_embeddings")),
    (64, ("max_position_embeddings", "n_positions", "max_target_positions", "n_ctx", "max_seq_len",
         "max_sequence_length", "seq_length", "max_seq_length", "mamba_d_ssm", "context_length",
         "max_patches", "num_position_embeddings")),
    (VOCABULARY, ("vocab_size", "entity_vocab_size", "n_words", "codebook_size", "char_vocab_size",
                 "vocab_size_per_layer_input", "decoder_vocab_size", "encoder_vocab_size")),
)  # fmt: skip
TINY = {name: size for size, names in _SIZES for name in names}
# one value for each stage of a model whose stages differ
_STAGES = {
    "depths": (1, 1, 1, 1), "hidden_sizes": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8),
    "num_attention_heads": (1, 2, 4, 8), "embed_dims": (16, 32, 64, 128),
    "encoder_hidden_sizes": (16, 32, 64, 128), "conv_dim": (16,) * 16, "tdnn_dim": (16,) * 8,
    "embed_dim": (16, 32, 64, 128),
}  # fmt: skip
# what a default of None would leave to a size that is not tiny
_IF_NONE = {"head_dim": 8, "num_key_value_heads": HEADS, "n_routed_experts": 4,
            "num_experts_per_tok": 2}  # fmt: skip
_NO_SIZE = ("token_id", "token_index")


def families() -> dict[str, tuple[str, str]]:
    """Modality and class name of each family, by its model type."""
    found: dict[str, tuple[str, str]] = {}
    for modality, tasks in TASKS.items():
        for task in tasks:
            mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
            for kind, name in mapping.items():
                found.setdefault(kind, (modality, name if isinstance(name, str) else name[0]))
    return {kind: found[kind] for kind in sorted(found)}


def config(kind: str, **changes: Any):
    """The tiny config of a family."""
    made = CONFIG_MAPPING[kind]
    return _config(made(), itertools.count(3), OWN.get(kind, {}) | changes)


def _config(default: PreTrainedConfig, ids, changes: dict[str, Any]):
    """The tiny config beside a default one."""
    config_class = type(default)
    fields = {f.name: _default(f) for f in dataclasses.fields(config_class)}
    below, given = _below(default, fields), {}
    for name, default in fields.items():
        if name in below or name == "transformers_version":
            continue
        value = _small(name, default, ids)
        if value is not None:
            given[name] = value
    if "kv_lora_rank" in fields:  # a latent attention has keys for every head
        given["num_key_value_heads"] = HEADS
    given |= changes
    for name, inner in below.items():
        own = changes.get(name, {})
        if "model_type" not in own:  # else it is a config already
            given[name] = _config(inner, ids, own).to_dict()
    return config_class(**given)


def _below(default: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, PreTrainedConfig]:
    """The configs that a default config holds."""
    names = [name for name in getattr(default, "sub_configs", {}) if name in fields]
    held = {name: getattr(default, name, None) for name in names}
    return {name: inner for name, inner in held.items() if isinstance(inner, PreTrainedConfig)}


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else None


def _small(name: str, default: Any, ids) -> Any:
    """The tiny value of a field, or None to leave it."""
    if name.endswith(_NO_SIZE) and isinstance(default, int) and not isinstance(default, bool):
        if name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            return ("pad_token_id", "bos_token_id", "eos_token_id").index(name)
        return next(ids) if default >= 3 else default
    if isinstance(default, (list, tuple)) and default and all(isinstance(v, int) for v in default):
        stages = _STAGES.get(name)
        return None if stages is None else list(stages[: len(default)])
    if name in _IF_NONE and default is None:
        return _IF_NONE[name]
    if isinstance(default, bool) or not isinstance(default, int):
        return None
    return min(TINY[name], default) if name in TINY and default > 0 else None


def model(kind: str, class_name: str, **changes: Any) -> nn.Module:
    """A tiny random model of a family, in evaluation mode, with weights that differ."""
    import transformers

    torch.manual_seed(0)
    model_class, given = getattr(transformers, class_name), config(kind, **changes)
    try:
        made = model_class(given)
    except AttributeError:  # of a model with images or sound: the class is its language model's
        made = model_class(given.get_text_config(decoder=True))
    made = made.float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return made
