"""The other side of tests/models/test_adapterhub.py: runs where ``adapters`` 1.x is installed, which
wants a transformers older than ours (its own environment: ``pip install adapters``).

``write FOLDER``: small models with methods of theirs, saved, with what they give.
``read FOLDER``: loads what stands there and keeps what it gives beside it.
"""

import sys
from pathlib import Path

import adapters
import torch
import transformers

SMALL = dict(vocab_size=61, max_position_embeddings=64, pad_token_id=1)
PLAIN = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
BART = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)  # fmt: skip
T5 = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
LABELS = PLAIN | dict(num_labels=3)
MODELS = {
    "bart": ("Bart", "ForConditionalGeneration", BART),
    "bert": ("Bert", "ForSequenceClassification", LABELS),
    "electra": ("Electra", "ForSequenceClassification", LABELS | dict(embedding_size=24)),
    "llama": ("Llama", "ForCausalLM", PLAIN | dict(num_key_value_heads=4)),
    "mbart": ("MBart", "ForConditionalGeneration", BART),
    "mistral": ("Mistral", "ForCausalLM",
                PLAIN | dict(num_key_value_heads=4, head_dim=8, sliding_window=None)),
    "mt5": ("MT5", "ForConditionalGeneration", T5),
    "roberta": ("Roberta", "ForSequenceClassification", LABELS),
    "t5": ("T5", "ForConditionalGeneration", T5),
    "xlm-roberta": ("XLMRoberta", "ForSequenceClassification", LABELS),
}  # fmt: skip
WITHOUT_PREFIX = ("mt5", "t5")  # their position bias counts it: another function than the paper's
METHODS = {
    "par_bn": adapters.ParBnConfig(),
    "learned": adapters.ParBnConfig(scaling="learned"),
    "double_seq_bn": adapters.DoubleSeqBnConfig(),
    "norm": adapters.DoubleSeqBnConfig(ln_after=True, scaling=2.0),
    "left_out": adapters.DoubleSeqBnConfig(leave_out=[1]),
    "lora": adapters.LoRAConfig(attn_matrices=["q", "k", "v"], r=5, alpha=10),
    "lora_left_out": adapters.LoRAConfig(r=5, alpha=10, leave_out=[0]),
    "prefix": adapters.PrefixTuningConfig(prefix_length=5, bottleneck_size=40),
    "prefix_left_out": adapters.PrefixTuningConfig(prefix_length=5, flat=True, leave_out=[0]),
    "mam": adapters.MAMConfig(
        adapters.PrefixTuningConfig(prefix_length=5, bottleneck_size=40), adapters.ParBnConfig()
    ),
}


def pairs() -> list[tuple[str, str]]:
    """Every architecture with every method it has here."""
    prefixed = [name for name in METHODS if "prefix" in name or name == "mam"]
    return [(a, m) for a in MODELS for m in METHODS
            if a not in WITHOUT_PREFIX or m not in prefixed]  # fmt: skip


def built(architecture: str):
    kind, task, config = MODELS[architecture]
    made = getattr(transformers, f"{kind}Config")(**(SMALL | config))
    made._attn_implementation = "eager"  # under sdpa, prefixes of adapters 1.3 are wrong
    torch.manual_seed(0)
    model = getattr(transformers, kind + task)(made).eval()
    adapters.init(model)
    return model


def task_of(architecture: str) -> str:
    return MODELS[architecture][1]


def result(model, given: dict) -> torch.Tensor:
    """The logits; of mT5, whose output layer is another in every transformers, what goes there."""
    with torch.no_grad():
        out = model(**given, output_hidden_states=model.config.model_type == "mt5")
    return out.decoder_hidden_states[-1] if model.config.model_type == "mt5" else out.logits


def write(folder: Path) -> None:
    for architecture, name in pairs():
        model = built(architecture)
        base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        model.add_adapter(name, config=METHODS[name])
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key not in base:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.set_active_adapters(name)
        ids, mask = torch.randint(4, 61, (3, 9)), torch.ones(3, 9, dtype=torch.long)
        mask[1, 6:] = mask[2, 7:] = 0
        given = dict(input_ids=ids, attention_mask=mask)
        if task_of(architecture) == "ForConditionalGeneration":
            given["decoder_input_ids"] = ids
        place = folder / f"{architecture},{name}"
        place.mkdir(parents=True)
        model.save_adapter(str(place), name)
        torch.save(dict(base=base, given=given, result=result(model, given)), place / "out.pt")


def read(folder: Path) -> None:
    for place in sorted(path.parent for path in folder.glob("*/out.pt")):
        model, out = built(place.name.split(",")[0]), torch.load(place / "out.pt")
        model.load_state_dict(out["base"], strict=False)
        model.set_active_adapters(model.load_adapter(str(place)))
        torch.save(result(model, out["given"]), place / "theirs.pt")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
