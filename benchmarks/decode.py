"""Decoding with unmerged methods: time per token, compared with the frozen model in one run.

    python -m benchmarks.decode                               prints the table
    python -m benchmarks.decode --batch 1 --method mam lora   only these
    python -m benchmarks.decode --record                      also writes benchmarks/results/

BART-base shapes, random weights, a source of 64 tokens. One step: the decoder on one token a row
with a cache of 32 or more, so M = 1, 8 and 32 tokens through each linear layer. A measurement is a
generate of 32 tokens, about a summary of XSum: what runs once in each generate (the MLP of a
prefix) is part of it. With so few rows the time of a step is the time to read weights: K N of a
projection, and (K + N) R of a method's rank part.

The models generate at the same time. They take turns of two tokens, in another order each time, so
that other load on the machine is equal for all. The time of a generate is the sum of the medians
of its turns. "lora merged" computes what the frozen model does: its ratio shows what the machine
can tell apart.
"""

import argparse
import contextlib
import copy
import random
from collections.abc import Iterator
from statistics import fmean, median

import torch
from transformers import BartConfig, BartForConditionalGeneration, EncoderDecoderCache
from transformers.cache_utils import DynamicCache

import pelt_fast
from benchmarks.common import table, write
from benchmarks.timing import clock_of
from pelt_fast.injection.generate import generating
from pelt_fast.presets import method as preset

BATCHES, SOURCE, PAST, STEPS, TURN = (1, 8, 32), 64, 32, 32, 2
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


class Decoding:
    """A model that decodes from a cache of PAST tokens a row."""

    def __init__(self, model: BartForConditionalGeneration, batch: int):
        self.model, self.decoder = model, model.get_decoder()
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        source, past = (torch.randint(4, 1000, (batch, n)).to(model.device) for n in (SOURCE, PAST))
        self.token = past[:, :1]
        with torch.inference_mode():
            self.encoded = model.get_encoder()(source).last_hidden_state
            self._decode(past)

    def _decode(self, tokens: torch.Tensor) -> torch.Tensor:
        found = self.decoder(tokens, encoder_hidden_states=self.encoded,
                             past_key_values=self.cache, use_cache=True)  # fmt: skip
        return found.last_hidden_state

    @torch.inference_mode()
    def turn(self, _) -> None:
        """Decode TURN tokens."""
        for _ in range(TURN):
            self.model.lm_head(self._decode(self.token))

    @contextlib.contextmanager
    def generate(self) -> Iterator[None]:
        """The context in which ``model.generate`` runs its steps; the cache is PAST long again at
        the end."""
        with generating(self.model):
            yield
        self.cache.self_attention_cache.crop(-STEPS)


def generate(
    models: dict[str, Decoding], device: torch.device, order: random.Random
) -> dict[str, list[float]]:
    """All generate STEPS tokens, in turns: the seconds of a token, by model and turn."""
    clock, found = clock_of(device), {name: [] for name in models}
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(model.generate())
        for i in range(STEPS // TURN):
            for name in order.sample(list(models), len(models)):
                found[name].append(clock(models[name].turn, i, device) / TURN)
    return found


def measure(
    repeats: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32, *,
    methods: tuple[str, ...] | None = None, batches: tuple[int, ...] | None = None,
) -> dict[str, dict[str, list[list[float]]]]:  # fmt: skip
    """Seconds of a token in every turn of every repeat, by batch and provider; without ``methods``
    and ``batches``, of ``METHODS`` and ``BATCHES``."""
    device, methods = device or torch.device("cpu"), methods or tuple(METHODS)
    found = {name: model.to(device, dtype) for name, model in models(methods).items()}
    order, result = random.Random(0), {}
    for batch in batches or BATCHES:
        turns = {name: Decoding(model, batch) for name, model in found.items()}
        generate(turns, device, order)  # not counted
        times = [generate(turns, device, order) for _ in range(repeats)]
        result[str(batch)] = {name: [seconds[name] for seconds in times] for name in turns}
    return result


def medians(repeats: dict[str, dict[str, list[list[float]]]]) -> dict[str, dict[str, float]]:
    """The mean over a generate of the median of each turn, by batch and provider."""
    return {
        batch: {name: fmean(map(median, zip(*times, strict=True))) for name, times in found.items()}
        for batch, found in repeats.items()
    }


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
        shape = dict(source=SOURCE, past=PAST, steps=STEPS, turn=TURN, methods=sizes)
        result = dict(shape=shape, seconds=seconds, repeats=repeats)
        path = write("decode", result)
        print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
