"""Small random models under the names that the pages use, so that nothing is downloaded.

``from_pretrained("facebook/bart-large")`` reads the folder of that name when there is one.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    PreTrainedTokenizerFast,
    RobertaForMaskedLM,
)

from tests import small

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
LONGEST = 100  # tokens, so bytes
VOCABULARY = len(SPECIAL) + 256
ROOM = 1024  # tokens of a conversation


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, between <s> and </s>."""
    vocabulary = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {token: i for i, token in enumerate(vocabulary)}
    found = Tokenizer(models.BPE(vocab=ids, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=found, model_max_length=LONGEST, **SPECIAL)


def save(folder: str, make, **changes) -> None:
    """A random model of a maker of ``tests.small`` and the tokenizer, in ``folder``."""
    model = make(vocab_size=VOCABULARY, max_position_embeddings=LONGEST + 2, **changes)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def bart(folder: str, **changes) -> None:
    """BART for conditional generation."""
    ids = dict(bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2)
    save(folder, small.bart, **(ids | changes))


def roberta(folder: str, **changes) -> None:
    """RoBERTa as it is pretrained: a classification head is new after loading it."""
    save(folder, small.roberta, kind=RobertaForMaskedLM, **changes)


def llama(folder: str, **changes) -> None:
    """Llama for causal language modelling."""
    save(folder, small.llama, **(dict(bos_token_id=0, eos_token_id=2) | changes))


def biogpt(folder: str) -> None:
    """BioGPT, an architecture that the table has no row for."""

    def make(**changes):
        config = dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            pad_token_id=small.PAD, layerdrop=0.0,
        )  # fmt: skip
        return BioGptForCausalLM(BioGptConfig(**(config | changes)))

    save(folder, make)


def chat(folder: str, **changes) -> None:
    """Llama with a chat template, and room for a conversation."""
    own = tokenizer()
    own.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    own.model_max_length = ROOM
    ids = dict(bos_token_id=0, eos_token_id=2, pad_token_id=small.PAD)
    size = dict(vocab_size=VOCABULARY, max_position_embeddings=ROOM)
    small.llama(**(size | ids | changes)).save_pretrained(folder)
    own.save_pretrained(folder)
