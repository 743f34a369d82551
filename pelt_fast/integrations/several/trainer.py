"""transformers' Trainer, with a batch of each of several methods in every step."""

from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from pelt_fast.compose.route import route, routing_of
from pelt_fast.compose.together import together_of
from pelt_fast.layouts.names import modules_of

from ..trainer import PeltTrainer
from .losses import Loss, loss_of, losses_of, without_labels
from .methods import TrainedMethod, TrainedMethods
from .runs import MethodRun
from .schedules import factor
from .steps import Step, Steps, only, seed_of


class SeveralTrainer(PeltTrainer):
    """A step has a batch of every method that trains, each under its method, and the loss is the
    sum of theirs. Rates, schedules, clipping and the end are each method's own."""

    def __init__(
        self, model: nn.Module, args: TrainingArguments, runs: dict[str, MethodRun], data_collator
    ):
        super().__init__(model, args, data_collator, train_dataset=Steps(runs))
        self.methods = TrainedMethods(self._plain_model(), runs)
        self.routing = routing_of(self._plain_model())
        self._losses: dict[str, torch.Tensor] = {}  # of the step that runs
        self._logged = dict.fromkeys(runs, 0)  # of each method, the losses that a log has
        self._rates: dict[str, float] = {}
        self._loss: Loss | None = None
        self._collate = self._get_collator_with_removed_columns(self.data_collator)
        self.add_callback(_Ends(self.methods))

    def get_train_dataloader(self) -> DataLoader:
        """The steps in their order. Rows become a batch when it is known which methods train."""
        loader = DataLoader(
            self.train_dataset, collate_fn=only, num_workers=self.args.dataloader_num_workers
        )
        return self.accelerator.prepare(loader)

    def training_step(self, *args, **kwargs):
        """As transformers' own; then each method is made ready for the optimizer, or stopped."""
        loss = super().training_step(*args, **kwargs)
        rates = {group["method"]: group["lr"] for group in self.optimizer.param_groups}
        self._rates |= {name: rates[name] for name in self._losses}
        self.methods.ready(self._losses)
        self._losses = {}
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of the methods' losses, each of its own rows."""
        rows = self._rows_that_train(inputs["step"])
        features = [feature for own in rows.values() for feature in own]
        batch = self._prepare_inputs(dict(self._collate(features)))
        names = [name for name, own in rows.items() for _ in own]
        self._seed(rows)
        if self._loss is None:
            self._loss = self._loss_of(model, batch, names)
        with route(self._plain_model(), names):
            outputs = model(**without_labels(self.model, batch))
        counts = [len(own) for own in rows.values()]
        found = losses_of(self._loss, outputs.logits, batch["labels"], counts, self.model.config)
        self._losses = dict(zip(rows, (loss.detach() for loss in found)))
        total = torch.stack([torch.where(loss.isfinite(), loss, 0) for loss in found]).sum()
        return (total, outputs) if return_outputs else total

    def _loss_of(self, model: nn.Module, batch: dict, names: list[str]) -> Loss:
        """The kind of the model's loss. A method with another number of classes cannot show it: the
        base then does, with labels that it has."""
        plain = self._plain_model()
        if together_of(plain).classes.by_method:
            known = batch["labels"].clamp(max=self.model.config.num_labels - 1)
            batch, names = {**batch, "labels": known}, [None] * len(names)
        with route(plain, names):
            return loss_of(model, batch, self.model.config)

    def _rows_that_train(self, step: Step) -> dict[str, list]:
        return {n: rows for n, rows in step.rows.items() if self.methods.by_name[n].trains}

    def _seed(self, names) -> None:
        """Give each method its seeds of this step, whatever else trains."""
        for name in names:
            method = self.methods.by_name[name]
            seed = seed_of(method.run.seed, "step", len(method.losses))
            self.routing.generators[self.routing.ids[name]].manual_seed(seed)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """AdamW with two groups for each method: with weight decay and without."""
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [group for method in self.methods for group in self._groups(method)]
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def _groups(self, method: TrainedMethod) -> list[dict]:
        decayed = set(self.get_decay_parameter_names(as_alone(self._plain_model(), method)))
        own = dict(method=method.name, lr=method.run.learning_rate)
        groups = [
            {**own, "params": [p for n, p in method.parameters.items() if (n in decayed) == decays],
             "weight_decay": method.run.weight_decay * decays}
            for decays in (True, False)
        ]  # fmt: skip
        return [group for group in groups if group["params"]]

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> LambdaLR:
        """Each group's schedule is that of its method."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            runs = [self.methods.by_name[g["method"]].run for g in optimizer.param_groups]
            self.lr_scheduler = LambdaLR(optimizer, [factor(run) for run in runs])
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As transformers' own, with the loss and the rate of each method: the mean of the losses
        since the log before."""
        if "loss" in logs:
            logs.pop("learning_rate", None)
            for method in self.methods:
                new = method.losses[self._logged[method.name] :]
                if new:
                    logs[f"loss/{method.name}"] = sum(new) / len(new)
                    logs[f"learning_rate/{method.name}"] = self._rates[method.name]
                self._logged[method.name] = len(method.losses)
        super().log(logs, *args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None) -> None:
        """The norm of all gradients together says nothing."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        self.methods.save(Path(self.args.output_dir if output_dir is None else output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.methods.load(Path(resume_from_checkpoint))
        self._logged = {method.name: len(method.losses) for method in self.methods}


class _Ends(TrainerCallback):
    """Saves what has ended, and ends the training with the last method."""

    def __init__(self, methods: TrainedMethods):
        self.methods = methods

    def on_step_end(self, args, state, control, **kwargs):
        if not self.methods.end_step():
            control.should_training_stop = True


def as_alone(model: nn.Module, method: TrainedMethod) -> nn.Module:
    """The parameters of a method in a tree of modules, under the names that they have alone. So
    transformers decides by name what decays, and not by the name of the method."""
    root, own = nn.Module(), modules_of(model)
    for name, parameter in method.parameters.items():
        at, path = root, name.split(".")
        for i, step in enumerate(path[:-1]):
            if step not in at._modules:
                norm = isinstance(own.get(".".join(path[: i + 1])), nn.LayerNorm)
                at._modules[step] = (
                    nn.LayerNorm(0, elementwise_affine=False) if norm else nn.Module()
                )
            at = at._modules[step]
        at.register_parameter(path[-1], parameter)
    return root
