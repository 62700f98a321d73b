"""`layerwise.hf.Trainer`: a `transformers.Trainer` with another training step."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.randomness import preserved_generators
from layerwise.core.rule import Rule
from layerwise.core.tasks import LanguageModel, MultiLabel, Regression, Task
from layerwise.errors import LayerwiseError
from layerwise.extras import need
from layerwise.learner import Learner
from layerwise.learner.arguments import check_further
from layerwise.runs.checkpoint import load_latest, save

transformers: Any = need("transformers", "hf")
STATE = "learner"
"""Folder in a checkpoint: the state of the rule's own modules, and the optimizers' state by parameter name."""
FROM_ARGS = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "clip": "max_grad_norm",
    "accumulate": "gradient_accumulation_steps",
    "precision": "bf16 or fp16",
    "label_smoothing": "label_smoothing_factor",
    "seed": "seed",
    "schedule": "lr_scheduler_type",
    "device": "use_cpu",
}
"""Options of a learner that `TrainingArguments` give, and their names there."""
OWN = {
    **{name: f"{there} of the TrainingArguments; set it there" for name, there in FROM_ARGS.items()},
    **dict.fromkeys(("model", "rule"), "an argument of its own; give it there"),
    "example": "taken from the train_dataset; leave it out",
}
"""Arguments of a learner that a trainer gives, and what the user does instead."""


class Trainer(transformers.Trainer):
    """A `transformers.Trainer` whose training step updates block by block.

    Schedule, logging, evaluation, checkpoints and resuming, accumulation and bf16 follow its `TrainingArguments`.
    Gradients are clipped per block (`max_grad_norm`), so no norm of the whole gradient is logged.

    Args:
        model: a model of transformers, or any module that takes the batches; adapters of peft too.
        args: `transformers.TrainingArguments`.
        rule: name of a rule, or a rule.
        learner: further arguments of `Learner`: `cuts` (default `"auto"`), `output`, `read`, `tied`, `task`,
            `optimizer`. By default the model's class decides the task: next tokens for a causal language model,
            labels per token for masked ones, encoder-decoders and token classifiers; for sequence classifiers what
            their `problem_type` says, regression with one label; else a class per sample.
        options: everything else that `transformers.Trainer` takes.

    Raises:
        LayerwiseError: arguments that a learner cannot use, several processes or devices, batches without labels.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        rule: str | Rule = "local_ce",
        learner: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        check_further(learner, Learner, OWN)
        self.rule, self.learner_options = rule, {"cuts": "auto", **(learner or {})}
        if any(part is not None for part in options.get("optimizers", ())):
            raise LayerwiseError(
                "every block needs its own optimizer, so optimizers=(...) cannot be used; give "
                'learner={"optimizer": ...}, or optim in the TrainingArguments.'
            )
        if options.get("compute_loss_func") is not None:
            raise LayerwiseError("the rule computes the loss, so compute_loss_func cannot be used; give a task.")
        if type(self).compute_loss is not transformers.Trainer.compute_loss:
            raise LayerwiseError(
                f"the rule computes the loss in training, so compute_loss of {type(self).__name__} would not be "
                'called; take it out, and give learner={"task": Loss(...)} or another task.'
            )
        super().__init__(model, args, **options)
        _check_arguments(self.args)
        self.learner: Learner | None = None
        self.accelerator.scaler = None  # a learner has one for each block

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the learner, and return its optimizers as one."""
        if self.learner is None or self.learner.network.model is not self.model:
            self.learner = self._make_learner()
            self.optimizer = self.learner.optimizer
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Train every block on the batch; the last batch of an accumulation updates."""
        assert self.learner is not None
        model.train()
        inputs = self._with_labels(inputs)
        metrics = self.learner.step(self._prepare_inputs(inputs))
        if self.accelerator.sync_gradients:
            self.learner.flush()  # the last update of an epoch may have fewer batches
        return metrics.loss.detach() / self.current_gradient_accumulation_steps

    def _make_learner(self) -> Learner:
        args = self.args
        cls, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(args, self.model)
        own = {name: value for name, value in options.items() if name not in ("lr", "weight_decay")}  # given below
        optimizer = {"optimizer": cls, "optimizer_options": own}
        chosen = {"task": task_of(self.model, args.label_smoothing_factor), **optimizer, **self.learner_options}
        if "optimizer" in self.learner_options:
            chosen["optimizer_options"] = self.learner_options.get("optimizer_options")
        if args.label_smoothing_factor and chosen["task"] is None:
            chosen["label_smoothing"] = args.label_smoothing_factor
        return Learner(
            self.model,
            self.rule,
            lr=options.get("lr", args.learning_rate),
            weight_decay=args.weight_decay,
            clip=args.max_grad_norm or None,
            accumulate=args.gradient_accumulation_steps,
            precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            seed=args.seed,
            example=self._prepare_inputs(self._first_batch()),
            **chosen,
        )

    def _with_labels(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        if "labels" in inputs:
            return inputs
        if "label" in inputs:  # as some data sets call it
            return {**{name: value for name, value in inputs.items() if name != "label"}, "labels": inputs["label"]}
        raise LayerwiseError(
            f"the batches hold {', '.join(inputs)} and no labels; give a data collator that adds labels, such as "
            "DataCollatorForLanguageModeling(tokenizer, mlm=False)."
        )

    def _first_batch(self) -> Mapping[str, Any]:
        """Two samples, as the data loader would give them, without changing any generator."""
        if self.train_dataset is None:
            raise LayerwiseError("there is no train_dataset; give one.")
        dataset, collator = self.train_dataset, self.data_collator
        with preserved_generators(self.args.device):
            if hasattr(dataset, "column_names") and hasattr(dataset, "features"):  # of the library datasets
                dataset = self._remove_unused_columns(dataset, description="training")
            else:
                collator = self._get_collator_with_removed_columns(collator, description="training")
            batch = collator(list(itertools.islice(iter(dataset), 2)))
        return self._with_labels(batch)

    # The gradients of a block are gone when the next one runs.

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        return None

    # Checkpoints.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        assert self.learner is not None
        state = {name: value for name, value in self.learner.state_dict().items() if name != "model"}
        save(Path(output_dir) / STATE, self.learner.steps, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.learner is None:
            return
        state, _ = load_latest(Path(checkpoint) / STATE)
        if state is None:
            raise LayerwiseError(f"{checkpoint} holds no {STATE}; it was written by another Trainer.")
        self.learner.load_state_dict({**state, "model": self.learner.network.state_dict()})


def _check_arguments(args: Any) -> None:
    """Raise LayerwiseError for arguments that would be ignored."""
    if args.world_size > 1 or args.n_gpu > 1:
        raise LayerwiseError(
            "layerwise.hf.Trainer trains in one process on one device; for several, leave the model unwrapped and use "
            "Learner(..., replicas=...) in a loop of your own, or layerwise train --parallel data."
        )
    for name in ("deepspeed", "fsdp", "torch_compile"):
        if getattr(args, name, None):
            raise LayerwiseError(
                f"{name} wraps the whole model, and a learner runs it block by block; leave it out of the "
                "TrainingArguments."
            )


def task_of(model: Any, label_smoothing: float = 0.0) -> Task | None:
    """What the labels of a model of transformers mean, by its class and `problem_type`; None for a class per sample."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters of peft
    auto = need("transformers.models.auto.modeling_auto", "hf")
    name = type(inner).__name__
    if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not name.endswith("MaskedLM"):
        return LanguageModel(label_smoothing=label_smoothing)
    if name in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        problem = getattr(inner.config, "problem_type", None)
        if problem == "regression" or (problem is None and inner.config.num_labels == 1):
            return Regression()
        return MultiLabel() if problem == "multi_label_classification" else None
    by_position = (
        *auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values(),
        *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
        *auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(),
        *auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values(),
    )
    return LanguageModel(shift=False, label_smoothing=label_smoothing) if name in by_position else None
