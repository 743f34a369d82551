"""Ask a model with a saved method, in the terminal."""

import argparse
import sys
from collections.abc import Iterator

from pelt_fast.cli.arguments import add_saved


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The method, its base, the prompts and how to decode."""
    add_saved(parser)
    lines = "what to answer (default: each line of the standard input)"
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help=lines)
    parser.add_argument("--plain", action="store_true", help="without the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="0 takes the most probable token (default)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the draws")


def run(options: argparse.Namespace) -> int:
    """Load once, answer each prompt as it comes."""
    import torch

    from pelt_fast.tasks.saved import load_saved, load_tokenizer_of

    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if options.temperature < 0:
        raise ValueError(f"--temperature must not be negative, got {options.temperature}")
    model, path = load_saved(options.folder, options.model)
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} of {path} does not generate")
    tokenizer = load_tokenizer_of(path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    for prompt in _prompts(options.prompt):
        _answer(model, tokenizer, prompt, options)
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


def _answer(model, tokenizer, prompt: str, options: argparse.Namespace) -> None:
    """Print an answer, token by token."""
    from transformers import TextStreamer

    from pelt_fast.tasks.instruct.generations import ends

    sampling = dict(do_sample=True, temperature=options.temperature)
    causal = not model.config.is_encoder_decoder
    ids = _encoded(tokenizer, prompt, options.plain, causal).to(model.device)
    pad = tokenizer.pad_token_id
    model.generate(
        **ids, max_new_tokens=options.max_new_tokens, num_beams=1,
        **(sampling if options.temperature else dict(do_sample=False)),
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        eos_token_id=ends(model, tokenizer),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )  # fmt: skip


def _encoded(tokenizer, prompt: str, plain: bool, causal: bool):
    """The ids of a prompt and their mask; under the chat template where there is one. A causal
    model goes on from the prompt: an end token that the tokenizer adds is taken off."""
    if not plain and getattr(tokenizer, "chat_template", None) is not None:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
    found = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = found["input_ids"][0].tolist()
    if causal and ids and ids[-1] == tokenizer.eos_token_id:
        for name, value in found.items():
            found[name] = value[:, :-1]
    if not found["input_ids"].numel():
        raise ValueError(f"--prompt: {prompt!r} has no tokens to go on from")
    return found
