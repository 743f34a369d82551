"""Decoding with unmerged methods: time per token, compared with the frozen model in one run.

    python -m benchmarks.decode                               prints the table
    python -m benchmarks.decode --batch 1 --method mam lora   only these
    python -m benchmarks.decode --record                      also writes benchmarks/results/

BART-base shapes, random weights, a source of 64 tokens. One step: the decoder on one token a row
with a cache of 32 or more, so M = 1, 8 and 32 tokens through each linear layer. A measurement is a
generate of 32 tokens, about a summary of XSum: what runs once in each generate (the MLP of a
prefix) is part of it. With so few rows the time
of a step is the time to read weights: K N of a projection, and (K + N) R of a method's rank part.
"""

import argparse
import copy
from statistics import median

import torch
from transformers import BartConfig, BartForConditionalGeneration, EncoderDecoderCache
from transformers.cache_utils import DynamicCache

import pelt_fast
from benchmarks.common import table, write
from benchmarks.timing import rounds
from pelt_fast.injection.generate import generating
from pelt_fast.presets import method as preset

BATCHES, SOURCE, PAST, STEPS = (1, 8, 32), 64, 32, 32
# sizes near half a percent to one percent of BART-base, as for an adapted model that is served
METHODS = {
    "lora": dict(), "prefix": dict(size=30), "scaled_parallel_adapter": dict(size=32),
    "houlsby": dict(size=32), "mam_glue": dict(),
}  # fmt: skip


def models(methods: tuple[str, ...]) -> dict[str, torch.nn.Module]:
    """The frozen model, each method unmerged, and LoRA merged. Sizes are those of ``METHODS``, else
    the preset's."""
    torch.manual_seed(0)
    config = BartConfig(
        d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12,
        decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
    )  # fmt: skip
    frozen = BartForConditionalGeneration(config).eval().requires_grad_(False)
    found = {"frozen": frozen}
    for name in methods:
        method = preset(name).replace(**METHODS.get(name, {}))
        found[name] = pelt_fast.inject(copy.deepcopy(frozen), method).eval()
    if "lora" in found:
        found["lora merged"] = pelt_fast.merge(copy.deepcopy(found["lora"]))
    return found


def decoding(model: BartForConditionalGeneration, batch: int):
    """A function that decodes STEPS tokens from a cache of PAST."""
    source, past = (torch.randint(4, 1000, (batch, n)).to(model.device) for n in (SOURCE, PAST))
    decoder, cache = model.get_decoder(), EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.inference_mode():
        encoded = model.get_encoder()(source).last_hidden_state
        decoder(past, encoder_hidden_states=encoded, past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def steps(_):
        with generating(model):  # the context in which model.generate runs its steps
            for _ in range(STEPS):
                hidden = decoder(past[:, :1], encoder_hidden_states=encoded, past_key_values=cache,
                                 use_cache=True).last_hidden_state  # fmt: skip
                model.lm_head(hidden)
        cache.self_attention_cache.crop(-STEPS)

    return steps


def measure(
    repeats: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32, *,
    methods: tuple[str, ...] | None = None, batches: tuple[int, ...] | None = None,
) -> dict[str, dict[str, list[float]]]:  # fmt: skip
    """Seconds of a token in every repeat, by batch and provider; without ``methods`` and
    ``batches``, of ``METHODS`` and ``BATCHES``."""
    device, methods = device or torch.device("cpu"), methods or tuple(METHODS)
    found = {name: model.to(device, dtype) for name, model in models(methods).items()}
    result = {}
    for batch in batches or BATCHES:
        steps = {name: decoding(model, batch) for name, model in found.items()}
        seconds = rounds(steps, repeats, device=device)
        result[str(batch)] = {name: [s / STEPS for s in times] for name, times in seconds.items()}
    return result


def medians(repeats: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """The median of the repeats, by batch and provider."""
    return {b: {n: median(times) for n, times in found.items()} for b, found in repeats.items()}


def report(seconds: dict[str, dict[str, float]]) -> str:
    """The table."""
    header = ["BART-base, one token", *(f"ms, batch {b}" for b in seconds), "ratio to frozen"]
    names = next(iter(seconds.values()))
    rows = []
    for name in names:
        ratios = [found[name] / found["frozen"] for found in seconds.values()]
        times = [f"{1e3 * found[name]:.1f}" for found in seconds.values()]
        rows.append([name, *times, " / ".join(f"{ratio:.2f}" for ratio in ratios)])
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--method", nargs="+", default=METHODS, metavar="NAME",
                        help=f"presets; default: {' '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES, help="rows of a step")
    options = parser.parse_args()
    methods, batches = tuple(options.method), tuple(options.batch)
    for name in methods:
        if name not in pelt_fast.methods():
            parser.error(f"unknown method {name!r}: choose {', '.join(pelt_fast.methods())}")
    if min(batches) < 1 or options.repeats < 1:
        parser.error("--batch and --repeats must be at least 1")
    repeats = measure(options.repeats, methods=methods, batches=batches)
    seconds = medians(repeats)
    print(report(seconds))
    if options.record:
        sizes = {name: METHODS.get(name, {}) for name in methods}
        shape = dict(source=SOURCE, past=PAST, steps=STEPS, methods=sizes)
        result = dict(shape=shape, seconds=seconds, repeats=repeats)
        path = write("decode", result)
        print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
