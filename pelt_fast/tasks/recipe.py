"""A recipe: all settings of one training run, as a small YAML file.

``recipes/`` holds one file for each task, with the paper's settings (Table 8, appendix A, and the
scripts of its code). A recipe is named by its task, ``xsum``, by a task and a preset,
``xsum-lora``, or by the path of a YAML file, which may name the recipe that it ``extends``.
"""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.presets import method as preset
from pelt_fast.presets import methods
from pelt_fast.words import changed

from .recipe_values import check_numbers, typed, with_length

FOLDER = Path(__file__).parent / "recipes"
SCHEDULES = ("polynomial", "linear", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")
QUANTISED = ("", "nf4", "int8")


@dataclass(frozen=True)
class Recipe:
    """The settings of one run; a YAML file may have every field.

    task: see ``tasks.registry``. model: a folder or hub name. method: a preset's name, a mapping
    {"preset": "lora", "r": 8} with changes in the words of ``builders``, or a PeltConfig as its
    JSON has it; sizes: fields replaced in it, by form ({"prefix": {"size": 30}}). A batch is
    ``batch_size`` rows or ``batch_tokens`` tokens (the longest row times the rows),
    ``accumulation`` of them a step; ``steps`` or ``epochs`` long. learning_rate is AdamW's;
    ``prefix_rate`` its share for a prefix's reparameterisation. warmup: a share of the steps (below
    1) or steps. ``max_length`` and ``max_target`` are tokens; ``source_prefix`` is put in front of
    every source text. Evaluation every ``evaluate_every`` steps (0: every epoch), on at most
    ``eval_examples`` rows (0: all), keeps the checkpoint that is best by ``select_by``.
    model_config: fields of the model's config to set. precision: a CPU takes fp32, or "bf16" where
    it multiplies in bf16. data: the folder of the rows, where the command names none.
    ``gradient_checkpointing`` keeps each layer's input alone and computes the rest in backward.

    Of the task instruct: ``quantize`` is "nf4" or "int8" (bitsandbytes) or ""; ``packing`` fills
    each row of a batch with ``max_length`` tokens of whole rows.
    """

    name: str
    task: str
    model: str = ""
    method: str | dict = "mam"
    sizes: dict = field(default_factory=dict)
    learning_rate: float = 1e-4
    prefix_rate: float = 1.0
    schedule: str = "polynomial"
    warmup: float = 0.0
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    steps: int = 0
    epochs: float = 0.0
    batch_size: int = 32
    batch_tokens: int = 0
    accumulation: int = 1
    max_length: int = 512
    max_target: int = 128
    source_prefix: str = ""
    beams: int = 1
    min_generated: int = 0
    max_generated: int = 128
    no_repeat_ngram: int = 0
    evaluate_every: int = 0
    eval_examples: int = 0
    eval_batch_size: int = 64
    select_by: str = "accuracy"
    precision: str = "fp32"
    model_config: dict = field(default_factory=dict)
    seed: int = 42
    data: str = ""
    quantize: str = ""
    packing: bool = True
    gradient_checkpointing: bool = False

    def __post_init__(self):
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must be in (0, 1), got {self.learning_rate}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(
                f"one of steps and epochs must be positive, got {self.steps} and {self.epochs}"
            )
        check_numbers(self)
        object.__setattr__(self, "adam_betas", tuple(self.adam_betas))
        for name in ("packing", "gradient_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name, options in (("schedule", SCHEDULES), ("precision", PRECISIONS),
                              ("quantize", QUANTISED)):  # fmt: skip
            if getattr(self, name) not in options:
                choice = ", ".join(filter(None, options))
                raise ValueError(f"{name} must be one of {choice}; got {getattr(self, name)!r}")
        self.config()

    def config(self) -> PeltConfig:
        """The method, its sizes replaced; ValueError for an unknown one or field."""
        config = self._method()
        unknown = self.sizes.keys() - {m.form for m in config.modifications}
        if unknown:
            raise ValueError(f"sizes names {sorted(unknown)[0]!r}, {config.name!r} has none")
        try:
            resized = tuple(_resized(m, self.sizes.get(m.form, {})) for m in config.modifications)
        except TypeError as error:
            raise ValueError(f"sizes: {error}") from None
        return dataclasses.replace(config, modifications=resized)

    def _method(self) -> PeltConfig:
        if not isinstance(self.method, dict):
            return preset(self.method)
        if "modifications" in self.method:
            return PeltConfig.from_json(json.dumps(self.method))
        name = self.method.get("preset")
        if not isinstance(name, str):
            raise ValueError(
                f"method must name a preset, as {{preset: lora, r: 8}}, got {self.method}"
            )
        words = {word: value for word, value in self.method.items() if word != "preset"}
        return changed(preset(name), words)

    def reworded(self, words: dict) -> "Recipe":
        """A copy whose method, sizes and all, is changed in the words of its builder; ValueError
        for a word that does not apply."""
        if not words:
            return self
        return self.replace(method=changed(self.config(), words).as_dict(), sizes={})

    def replace(self, **changes) -> "Recipe":
        """A copy with fields changed; of ``steps`` and ``epochs``, one replaces the other."""
        return dataclasses.replace(self, **with_length(changes))


def _resized(m: Modification, sizes) -> Modification:
    """A modification with fields replaced."""
    known = {item.name for item in dataclasses.fields(m)}
    if not isinstance(sizes, dict) or not sizes.keys() <= known:
        raise ValueError(f"sizes of {m.form} must be as {{size: 30}}, got {sizes!r}")
    return dataclasses.replace(m, **sizes)


def names() -> list[str]:
    """The names of all recipes: every task, and every task with every preset."""
    tasks = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return [*tasks, *(f"{task}-{method}" for task in tasks for method in methods())]


def load(name: str) -> Recipe:
    """The recipe of a name or file. Raises ValueError for an unknown name, key or value; the
    message has the most similar known one."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise FileNotFoundError(f"recipe {name} is not there")
        raw = _yaml(path)
        base = _extended(raw.pop("extends"), str(path)) if "extends" in raw else {}
        return _recipe(path.stem, {**base, **with_length(raw)}, str(path))
    return _recipe(name, _named(name), name)


def _extended(name, source: str) -> dict:
    return _named(typed("extends", name, str, source))


def _named(name: str) -> dict:
    task, _, method = name.partition("-")
    path = FOLDER / f"{task}.yaml"
    if not path.is_file() or (method and method not in methods()):
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ValueError(f"no recipe {name!r}{hint} (TASK or TASK-PRESET, tasks: {known})")
    raw = _yaml(path)
    own = raw.get("methods", {}).get(method or raw.get("method"), {})
    return {**raw, **({"method": method} if method else {}), **with_length(own)}


def _yaml(path: Path) -> dict:
    try:
        import yaml
    except ImportError:
        raise RuntimeError("recipes need the extra: pip install 'pelt_fast[train]'") from None
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(raw).__name__}")
    return raw


def _recipe(name: str, raw: dict, source: str) -> Recipe:
    raw = {key: value for key, value in raw.items() if key != "methods"}
    known = [f.name for f in dataclasses.fields(Recipe)]
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{source}: unknown key {key!r}{hint}")
    wanted = {f.name: f.type for f in dataclasses.fields(Recipe)}
    raw = {key: typed(key, value, wanted[key], source) for key, value in raw.items()}
    try:
        return Recipe(**{"name": name, **raw})
    except TypeError as error:
        raise ValueError(f"{source}: {error}") from None
