"""Ask a model with a saved method, in the terminal."""

import argparse
import math
import sys
from collections.abc import Iterator

from pelt_fast.cli.arguments import add_saved

NEW = 128  # tokens of an answer, where neither the user nor the model says fewer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The method, its base, the prompts and how to decode."""
    add_saved(parser)
    lines = "what to answer (default: each line of the standard input)"
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help=lines)
    parser.add_argument("--plain", action="store_true", help="without the chat template")
    most = f"tokens of an answer, at most (default: {NEW}, or what the positions leave)"
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help=most)
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="0 takes the most probable token (default)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the draws")


def run(options: argparse.Namespace) -> int:
    """Load once, answer each prompt as it comes."""
    import torch

    from pelt_fast.tasks.saved import load_saved, load_tokenizer_of

    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"--temperature must be a number >= 0, got {options.temperature}")
    if abs(options.seed) >= 2**63:
        raise ValueError(f"--seed must have at most 63 bits, got {options.seed}")
    model, path = load_saved(options.folder, options.model)
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} of {path} does not generate")
    tokenizer = load_tokenizer_of(path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    asked = (_asked(model, tokenizer, prompt, options) for prompt in _prompts(options.prompt))
    # what is wrong with one of the command's prompts is said before any is answered
    for ids, new in asked if options.prompt is None else list(asked):
        _answer(model, tokenizer, ids, new, options.temperature)
    return 0


def _prompts(given: list[str] | None) -> Iterator[str]:
    """The prompts of the command, or the lines of the standard input that are not empty."""
    if given is not None:
        yield from given
        return
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _asked(model, tokenizer, prompt: str, options: argparse.Namespace):
    """The ids of a prompt with their mask, and the most tokens that its answer may have."""
    from pelt_fast.tasks.tokens import check_token

    causal = not model.config.is_encoder_decoder
    ids = _encoded(tokenizer, prompt, options.plain, causal)
    check_token(int(ids["input_ids"].max()), model.config, tokenizer.name_or_path)
    return ids, _new_tokens(model, tokenizer, ids["input_ids"].shape[1], options.max_new_tokens)


def _new_tokens(model, tokenizer, tokens: int, wanted: int | None) -> int:
    """The most tokens of an answer to a prompt. ValueError where prompt or answer has more than the
    model has positions for. The last token of an answer needs none; the answer of an
    encoder-decoder begins with a token of its own."""
    from pelt_fast.tasks.loading import positions_of

    positions = positions_of(model.config, tokenizer)
    if positions is None:
        return wanted or NEW
    left = positions if model.config.is_encoder_decoder else positions - tokens + 1
    if tokens > positions:
        raise ValueError(f"--prompt has {tokens:,} tokens, the model has {positions:,} positions")
    if wanted is not None and wanted > left:
        raise ValueError(
            f"--max-new-tokens must be at most {left:,}, what is left of {positions:,} positions"
            f" with a prompt of {tokens:,} tokens; got {wanted:,}"
        )
    return wanted or min(NEW, left)


def _answer(model, tokenizer, ids, new: int, temperature: float) -> None:
    """Print an answer, token by token."""
    from transformers import TextStreamer

    from pelt_fast.tasks.instruct.generations import ends

    sampling = dict(do_sample=True, temperature=temperature)
    pad = tokenizer.pad_token_id
    model.generate(
        **ids.to(model.device), max_new_tokens=new, num_beams=1,
        **(sampling if temperature else dict(do_sample=False)),
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        eos_token_id=ends(model, tokenizer),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )  # fmt: skip


def _encoded(tokenizer, prompt: str, plain: bool, causal: bool):
    """The ids of a prompt and their mask; under the chat template where there is one. A causal
    model goes on from the prompt: an end token that the tokenizer adds is taken off."""
    chat = not plain and getattr(tokenizer, "chat_template", None) is not None
    text = _under_template(tokenizer, prompt) if chat else prompt
    found = tokenizer(
        text, add_special_tokens=not chat, return_tensors="pt", return_token_type_ids=False
    )
    ids = found["input_ids"][0].tolist()
    if not chat and causal and ids and ids[-1] == tokenizer.eos_token_id:
        for name, value in found.items():
            found[name] = value[:, :-1]
    if not found["input_ids"].numel():
        raise ValueError(f"--prompt: {prompt!r} has no tokens to go on from")
    return found


def _under_template(tokenizer, prompt: str) -> str:
    from pelt_fast.tasks.instruct.chat import Refused, rendered

    try:
        return rendered(tokenizer, [{"role": "user", "content": prompt}], answer=True)
    except Refused as error:
        raise ValueError(f"--prompt: the chat template refuses {prompt!r}: {error}") from None
