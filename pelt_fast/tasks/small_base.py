"""A small mBART-shaped base, trained here: no pretrained encoder-decoder comes without a network.

One vocabulary (byte-level BPE) and one model for English, German and Romanian: translation of
image captions (en-de) and of short sentences (en-ro), and documents put back from a noised form.
A tag in front of the source says what is wanted. Seeded. The norms stand in front of the blocks, as
mBART's do: that trains from nothing at this rate.
"""

import random
from pathlib import Path

import torch

from .data import load
from .recipe import Recipe
from .registry import Task
from .train import fit

TAGS = ("<de>", "<ro>", "<en>")
PAIRS = Task("generation", None, {"test": ("validation",)}, languages=("en", "ro"))
VOCABULARY, WIDTH, LAYERS, HEADS, POSITIONS = 8000, 256, 2, 4, 256
MASKED = 0.3  # of a document's words, in spans


def rows(folder: Path):
    """source and target of the whole mixture, a seeded order."""
    import datasets

    found: list[tuple[str, str]] = []
    for tag, paths in (("<de>", ("multi30k/train.en.gz", "multi30k/train.de.gz")),
                       ("<ro>", ("enro/tatoeba-test-2021-03-30.en.gz",
                                 "enro/tatoeba-test-2021-03-30.ro.gz"))):  # fmt: skip
        pairs = load(PAIRS, {s: [[folder / p for p in paths]] for s in ("train", "validation")})
        found += [(f"{tag} {x}", y) for x, y in zip(pairs.train["source"], pairs.train["target"])]
    found += [(f"<ro> {x}", y) for x, y in _manythings(folder / "enro/manythings_ron.txt.gz")]
    noise = random.Random(0)
    for text in _documents(folder / "xsum/xsum_docs_merged.jsonl.gz"):
        found.append((f"<en> {noised(text, noise)}", text))
    noise.shuffle(found)
    sources, targets = zip(*found)
    return datasets.Dataset.from_dict({"source": list(sources), "target": list(targets)})


def _manythings(path: Path) -> list[tuple[str, str]]:
    import gzip

    with gzip.open(path, "rt") as file:
        return [tuple(line.split("\t")[:2]) for line in file]


def _documents(path: Path, words: int = 90) -> list[str]:
    """Pieces of the documents, each of so many words."""
    import gzip
    import json

    pieces = []
    with gzip.open(path, "rt") as file:
        for line in file:
            text = json.loads(line)["document"].split()
            pieces += [" ".join(text[i : i + words]) for i in range(0, min(len(text), 270), words)]
    return [piece for piece in pieces if len(piece.split()) > 20]


def noised(text: str, noise: random.Random) -> str:
    """BART's text infilling: spans of words, three on average, each one mask."""
    words, kept, hidden = text.split(), [], 0
    budget, i = MASKED * len(words), 0
    while i < len(words):
        if hidden < budget and noise.random() < MASKED / 3:
            span = min(len(words) - i, 1 + int(noise.expovariate(0.5)))
            kept.append("<mask>")
            hidden, i = hidden + span, i + span
        else:
            kept.append(words[i])
            i += 1
    return " ".join(kept)


def tokenizer_of(texts, folder: Path):
    """A byte-level BPE of these texts, saved to ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *TAGS]
    plain = Tokenizer(models.BPE(unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    plain.train_from_iterator(texts, trainer)
    plain.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", pad_token="<pad>", eos_token="</s>",
        unk_token="<unk>", mask_token="<mask>", additional_special_tokens=list(TAGS),
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer


def build(folder: Path, output: Path, steps: int = 400, seed: int = 0) -> Path:
    """Train the base on the files of ``folder`` and save it to ``output``; returns ``output``."""
    from transformers import MBartConfig, MBartForConditionalGeneration

    import pelt_fast

    from .tokens import tokenised

    mixture = rows(folder)
    tokenizer = tokenizer_of([*mixture["source"], *mixture["target"]], output)
    torch.manual_seed(seed)
    config = MBartConfig(
        vocab_size=len(tokenizer), d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH, max_position_embeddings=POSITIONS, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    model = MBartForConditionalGeneration(config)
    pelt_fast.inject(model, "full")
    recipe = Recipe(
        "base", "generation", str(output), "full", steps=steps, batch_tokens=3072, batch_size=1,
        learning_rate=1e-3, schedule="polynomial", warmup=0.1, label_smoothing=0.1,
        max_length=128, max_target=128, seed=seed, select_by="loss",
    )  # fmt: skip
    encoded = tokenised(mixture, PAIRS, tokenizer, recipe.max_length, recipe.max_target)
    fit(model, tokenizer, recipe, encoded, encoded.select(range(8)), {}, output, keep=False,
        quiet=True)  # fmt: skip
    del model._pelt
    model.save_pretrained(output)
    return output
