"""`layerwise.lightning.LearnerMixin`: a `LightningModule` that is trained block by block.

Lightning's manual optimisation runs it: the learner updates, Lightning counts, logs, saves and resumes.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.learner import Learner, Metrics

STATE = "layerwise"
"""Key in a checkpoint: the state of the rule's own modules, and the optimizers' state by parameter name."""


class LearnerMixin:
    """A base class before `LightningModule` that gives a class its training step.

    The class defines `configure_learner`, which returns a `Learner` made with an example. `configure_optimizers` may
    be overridden as usual: let it return `self.learner.optimizer`, alone or with schedulers, which are stepped here.
    Clipping and accumulation are arguments of the learner.

        class Classifier(LearnerMixin, LightningModule):
            def configure_learner(self):
                return Learner(self.model, "local_ce", lr=1e-3, example=self.example_input_array)
    """

    automatic_optimization = False
    _learner: Learner | None = None
    _saved: Mapping[str, Any] | None = None

    @property
    def learner(self) -> Learner:
        """The learner; created on first use, at the latest with the optimizers."""
        if self._learner is None:
            learner = self.configure_learner()
            if not isinstance(learner, Learner):
                raise LayerwiseError(f"configure_learner returned {type(learner).__name__}; let it return a Learner.")
            if self._saved is not None:
                learner.load_state_dict({**self._saved, "model": learner.network.state_dict()})
            self._learner, self._saved = learner, None
        return self._learner

    def configure_learner(self) -> Learner:
        """Return the learner of this module's network.

        Raises:
            LayerwiseError: the class does not define it.
        """
        raise LayerwiseError(
            f"{type(self).__name__} defines no configure_learner; let it return Learner(self.model, rule, example=...)."
        )

    def batch(self, batch: Any) -> tuple[Any, Tensor | None]:
        """Inputs and labels of a batch: a pair as it is; in a mapping the labels are the entry `labels`."""
        return (batch, None) if isinstance(batch, Mapping) else tuple(batch)  # pyright: ignore[reportReturnType]

    def configure_optimizers(self) -> Any:
        """The optimizers of all blocks, as one."""
        return self.learner.optimizer

    def setup(self, stage: str) -> None:
        """Refuse settings with which Lightning would wrap the whole model."""
        super().setup(stage)  # pyright: ignore[reportAttributeAccessIssue]
        trainer: Any = self.trainer  # pyright: ignore[reportAttributeAccessIssue]
        if trainer.world_size > 1:
            raise LayerwiseError(
                "Lightning wraps the whole model for several processes, and a learner averages block by block; train "
                "in one process, or with Learner(..., replicas=...) in a loop of your own."
            )
        if str(trainer.precision).startswith("16"):
            raise LayerwiseError(
                'Lightning scales one loss in fp16, and a learner one per block; give Learner(..., precision="fp16") '
                'and leave the Trainer at precision="32-true".'
            )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Train every block on the batch, and log the rule's scalars as `train/<block>/<name>`."""
        before = self.learner.updates
        metrics = self.learner.step(*self.batch(batch))
        if self.trainer.is_last_batch:  # pyright: ignore[reportAttributeAccessIssue]
            self.learner.flush()  # the last update of an epoch may have fewer batches
        self._counted(before)
        self.log_metrics(metrics)

    def log_metrics(self, metrics: Metrics) -> None:
        """Log the metrics of a step."""
        found = {f"train/{block}/{key}": v for block, row in metrics.blocks.items() for key, v in row.items()}
        self.log_dict(found, batch_size=metrics.samples)  # pyright: ignore[reportAttributeAccessIssue]

    def on_train_epoch_end(self) -> None:
        """Step the schedulers of epochs."""
        self._step_schedulers("epoch")
        super().on_train_epoch_end()  # pyright: ignore[reportAttributeAccessIssue]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of the learner besides the weights."""
        if self._learner is not None:
            state = self._learner.state_dict()
            checkpoint[STATE] = {name: value for name, value in state.items() if name != "model"}
        super().on_save_checkpoint(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep it until the learner is created."""
        self._saved = checkpoint.get(STATE)
        super().on_load_checkpoint(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]

    def _counted(self, before: int) -> None:
        """Let Lightning count the learner's updates, and step the schedulers of steps."""
        for _ in range(self.learner.updates - before):
            self.optimizers().step()  # pyright: ignore[reportAttributeAccessIssue]
            self._step_schedulers("step")

    def _step_schedulers(self, interval: str) -> None:
        trainer: Any = self.trainer  # pyright: ignore[reportAttributeAccessIssue]
        for config in trainer.lr_scheduler_configs:
            done = trainer.global_step if interval == "step" else trainer.current_epoch + 1
            if config.interval == interval and done % config.frequency == 0:
                config.scheduler.step()
