"""The other side of tests/models/test_adapterhub.py: runs where ``adapters`` 1.x is installed, which
wants a transformers older than ours (its own environment: ``pip install adapters``).

``write FOLDER``: small models with methods of theirs, saved, with the logits they give.
``read FOLDER``: loads what stands there and keeps the logits it gives beside it.
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
MODELS = {
    "bert": ("Bert", "ForSequenceClassification", PLAIN | dict(num_labels=3)),
    "bart": ("Bart", "ForConditionalGeneration", BART),
    "llama": ("Llama", "ForCausalLM", PLAIN | dict(num_key_value_heads=4)),
}
METHODS = {
    "par_bn": adapters.ParBnConfig(),
    "learned": adapters.ParBnConfig(scaling="learned"),
    "double_seq_bn": adapters.DoubleSeqBnConfig(),
    "lora": adapters.LoRAConfig(attn_matrices=["q", "k", "v"], r=5, alpha=10),
    "prefix": adapters.PrefixTuningConfig(prefix_length=5, bottleneck_size=40),
    "mam": adapters.MAMConfig(
        adapters.PrefixTuningConfig(prefix_length=5, bottleneck_size=40), adapters.ParBnConfig()
    ),
}


def built(architecture: str):
    kind, task, config = MODELS[architecture]
    made = getattr(transformers, f"{kind}Config")(**(SMALL | config))
    made._attn_implementation = "eager"  # under sdpa, prefixes of adapters 1.3 are wrong
    torch.manual_seed(0)
    model = getattr(transformers, kind + task)(made).eval()
    adapters.init(model)
    return model


def logits(model, given: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


def write(folder: Path) -> None:
    for architecture in MODELS:
        for name, config in METHODS.items():
            model = built(architecture)
            base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            model.add_adapter(name, config=config)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if key not in base:
                        parameter.add_(0.2 * torch.randn_like(parameter))
            model.set_active_adapters(name)
            ids, mask = torch.randint(4, 61, (3, 9)), torch.ones(3, 9, dtype=torch.long)
            mask[1, 6:] = mask[2, 7:] = 0
            given = dict(input_ids=ids, attention_mask=mask)
            place = folder / f"{architecture}-{name}"
            place.mkdir(parents=True)
            model.save_adapter(str(place), name)
            torch.save(dict(base=base, given=given, logits=logits(model, given)), place / "out.pt")


def read(folder: Path) -> None:
    for place in sorted(path.parent for path in folder.glob("*/out.pt")):
        model, out = built(place.name.split("-")[0]), torch.load(place / "out.pt")
        model.load_state_dict(out["base"], strict=False)
        model.set_active_adapters(model.load_adapter(str(place)))
        torch.save(logits(model, out["given"]), place / "theirs.pt")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
