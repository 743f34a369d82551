"""Train a small mBART-shaped base: without a network there is no pretrained encoder-decoder.

One vocabulary (byte-level BPE) and one model for English, German and Romanian: translation of
image captions (en-de) and of short sentences (en-ro), and documents restored from a noised form.
A tag at the start of the source names the wanted output. All draws are seeded. The norms come
before the blocks, as in mBART: this trains from random weights at this rate. The base is scored on
short sentences that no training row translates.
"""

import gzip
import json
import random
from pathlib import Path

import torch

from .data import load
from .loading import prepare_generation
from .meter import losses
from .recipe import Recipe
from .registry import Task
from .train import fit

TAGS = ("<de>", "<ro>", "<en>")
PAIRS = Task("generation", None, {"test": ("validation",)}, languages=("en", "ro"))
VOCABULARY, WIDTH, LAYERS, HEADS, POSITIONS = 4000, 256, 2, 4, 256
MASKED = 0.3  # of a document's words, in spans
SCORED = 200  # short English sentences, with every translation they have
STEPS = 4000
ABOUT = "training.json"


def rows(folder: Path):
    """source and target of the whole mixture, in a seeded order, and of the held-out sentences."""
    noise = random.Random(0)
    short, scored = _short_sentences(folder / "enro", noise)
    found = [(f"<ro> {x}", y) for x, y in short]
    found += [(f"<de> {x}", y) for x, y in _parallel(folder / "multi30k/train", "en", "de")]
    for text in _documents(folder / "xsum/xsum_docs_merged.jsonl.gz"):
        found.append((f"<en> {noised(text, noise)}", text))
    noise.shuffle(found)
    return _dataset(found), _dataset([(f"<ro> {x}", y) for x, y in scored])


def _dataset(pairs: list[tuple[str, str]]):
    import datasets

    sources, targets = zip(*pairs)
    return datasets.Dataset.from_dict({"source": list(sources), "target": list(targets)})


def _short_sentences(folder: Path, noise: random.Random) -> tuple[list, list]:
    """English-Romanian pairs of two collections that share some; apart, those of some sources."""
    with gzip.open(folder / "manythings_ron.txt.gz", "rt") as file:
        pairs = [tuple(line.split("\t")[:2]) for line in file]
    pairs = dict.fromkeys(_parallel(folder / "tatoeba-test-2021-03-30", "en", "ro") + pairs)
    held = set(noise.sample(sorted({source for source, _ in pairs}), SCORED))
    return [p for p in pairs if p[0] not in held], [p for p in pairs if p[0] in held]


def _parallel(stem: Path, *languages: str) -> list[tuple[str, str]]:
    files = [[Path(f"{stem}.{language}.gz") for language in languages]]
    rows = load(PAIRS, {"train": files, "validation": files}).train
    return list(zip(rows["source"], rows["target"]))


def _documents(path: Path, words: int = 90) -> list[str]:
    """Pieces of the documents, each of ``words`` words."""
    pieces = []
    with gzip.open(path, "rt") as file:
        for line in file:
            text = json.loads(line)["document"].split()
            pieces += [" ".join(text[i : i + words]) for i in range(0, min(len(text), 270), words)]
    return [piece for piece in pieces if len(piece.split()) > 20]


def noised(text: str, noise: random.Random) -> str:
    """BART's text infilling: spans of three words on average, each replaced by one mask."""
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


def build(folder: Path, output: Path, steps: int = STEPS, seed: int = 0) -> Path:
    """Train the base on the files of ``folder`` and save it to ``output``; returns ``output``. Its
    score on the held-out sentences and its time are in ``training.json`` in the same folder."""
    import pelt_fast

    from .tokens import tokenised

    mixture, scored = rows(folder)
    tokenizer = tokenizer_of([*mixture["source"], *mixture["target"]], output)
    recipe = Recipe(
        "base", "wmt16", str(output), "full", steps=steps, batch_tokens=3072, batch_size=1,
        eval_batch_size=50, learning_rate=1e-3, schedule="polynomial", warmup=0.1,
        label_smoothing=0.1, max_length=128, max_target=128, max_generated=60, beams=1, seed=seed,
        select_by="loss", precision="bf16",
    )  # fmt: skip
    model = untrained(tokenizer, seed)
    prepare_generation(model, tokenizer, PAIRS, recipe)
    pelt_fast.inject(model, "full")
    encoded, finals = (
        tokenised(r, PAIRS, tokenizer, recipe.max_length, recipe.max_target)
        for r in (mixture, scored)
    )
    outcome = fit(model, tokenizer, recipe, encoded, finals, {"test": finals}, output, keep=False)
    model._pelt.changes.undo()
    del model._pelt
    about = dict(steps=steps, rows=len(encoded), sentences=len(finals), metrics=outcome.metrics,
                 seconds=outcome.seconds, losses=losses(outcome.log))  # fmt: skip
    model.save_pretrained(output)
    (output / ABOUT).write_text(json.dumps(about) + "\n")
    return output


def untrained(tokenizer, seed: int):
    """The base before its training."""
    from transformers import MBartConfig, MBartForConditionalGeneration

    torch.manual_seed(seed)
    return MBartForConditionalGeneration(MBartConfig(
        vocab_size=len(tokenizer), d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH, max_position_embeddings=POSITIONS, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    ))  # fmt: skip
