"""The paper's four tasks, and three for a user's data: where rows are, how they are scored."""

from dataclasses import dataclass

LOWER_IS_BETTER = ("loss", "perplexity")
# the names that a column may have in a user's file, the canonical one first
COLUMNS = {
    "text": ("text", "sentence", "premise", "sentence1"),
    "pair": ("pair", "text_pair", "sentence2", "hypothesis"),
    "label": ("label",),
    "source": ("source", "document", "src", "text", "oracle"),
    "target": ("target", "summary", "tgt"),
}


@dataclass(frozen=True)
class Task:
    """One task. ``hub``: dataset and configuration; ``finals``: what the last evaluation scores,
    each a name and the splits it may be (the first that is there). ``languages``: of a translation,
    and the endings of parallel files. ``classes``: of a classification."""

    name: str
    hub: tuple[str, str | None] | None
    finals: dict[str, tuple[str, ...]]
    classes: tuple[str, ...] = ()
    languages: tuple[str, str] | None = None
    codes: tuple[str, str] | None = None  # the languages' names in a multilingual tokenizer
    causal: bool = False  # a causal language model on conversations, completions or plain text

    @property
    def generates(self) -> bool:
        """Whether the answer is text."""
        return not self.classes

    @property
    def translates(self) -> bool:
        """Whether a source becomes a target: an encoder-decoder's tasks."""
        return self.generates and not self.causal

    @property
    def metrics(self) -> tuple[str, ...]:
        """What the last evaluation gives, in the order of the paper's tables."""
        if self.classes:
            return tuple(self.finals)
        if self.causal:
            return ("loss", "perplexity", "token_accuracy")
        return ("bleu", "loss") if self.languages else ("rouge1", "rouge2", "rougeL")

    @property
    def selects(self) -> tuple[str, ...]:
        """What a checkpoint can be selected by: the scores of an evaluation."""
        if self.classes:
            return ("accuracy", "loss")
        more = ("bleu_normalised",) if self.languages else ()
        return tuple(dict.fromkeys((*self.metrics, *more, "loss")))


TASKS = {
    task.name: task for task in (
        Task("sst2", ("nyu-mll/glue", "sst2"), {"accuracy": ("validation", "test")},
             ("negative", "positive")),
        Task("mnli", ("nyu-mll/glue", "mnli"), {
            "matched": ("validation_matched", "validation", "test"),
            "mismatched": ("validation_mismatched",),
        }, ("entailment", "neutral", "contradiction")),
        # a user's rows: the classes are those of the train split
        Task("classification", None, {"accuracy": ("validation", "test")}, ("0", "1")),
        Task("generation", None, {"test": ("test", "validation")}),
        Task("instruct", None, {"test": ("test", "validation")}, causal=True),
        Task("xsum", ("EdinburghNLP/xsum", None), {"test": ("test", "validation")}),
        Task("wmt16", ("wmt/wmt16", "ro-en"), {"test": ("test", "validation")},
             languages=("en", "ro"), codes=("en_XX", "ro_RO")),
    )
}  # fmt: skip


def task_of(name: str) -> Task:
    """The task of a name; ValueError names the known ones."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]
