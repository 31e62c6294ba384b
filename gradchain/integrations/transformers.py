"""Callbacks for the Trainer of Hugging Face transformers; see ``gradchain.integrations``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback

from gradchain.adapters.attach import Attached, attach
from gradchain.adapters.scheduler import schedule
from gradchain.integrations import handle_of, hyperparameters_of, innermost


class AttachTransforms(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Attach chains to the optimizer of a run, with the names that parameters have in the model.

    The Trainer has loaded its checkpoint before any callback sees the optimizer. The states of the transforms in it are
    taken up, with the dtype of the parameters, which a warning says where it has fewer digits.

    Args:
        **options: The arguments of ``gradchain.attach``, such as ``pre``, ``update``, ``post`` and ``param_ndim``.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.attached: Attached | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach, unless it has been done in a run before with the same optimizer."""
        optimizer = innermost(kwargs["optimizer"])
        if self.attached is None or self.attached.optimizers != [optimizer]:
            self.attached = attach(optimizer, model=kwargs["model"], **self.options)


class EvaluateAverages(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Evaluate with the averages of the parameters, which ``param_ema`` or ``lookahead`` keep in ``post``.

    It concerns evaluations in training, after which checkpoints are saved with the parameters themselves.
    """

    def __init__(self) -> None:
        self.stack = ExitStack()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the parameters their averages, if an evaluation follows."""
        if control.should_evaluate:
            self.stack.enter_context(handle_of(kwargs["optimizer"]).averaged())

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the parameters their own values back."""
        self.stack.close()


class LogMetrics(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Log what ``metrics()`` of the optimizer returns, and its hyperparameters, as often as the Trainer logs.

    Args:
        trainer: The Trainer, to which its callbacks have no other way: ``trainer.add_callback(LogMetrics(trainer))``.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log."""
        if control.should_log:
            optimizer = kwargs["optimizer"]
            self.trainer.log({**handle_of(optimizer).metrics(), **hyperparameters_of(optimizer)})


class ScheduleHyperparameters(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Let schedulers drive hyperparameters, beside that of the learning rate, with a step after each of the optimizer.

    A resumed run makes the steps of the schedulers again, from the values at the start, which the optimizer has saved.
    Where chains are attached, put it behind ``AttachTransforms``.

    Args:
        make: What makes the scheduler of each key, such as ``{"clip_by_norm.max_norm": partial(CosineAnnealingLR,
            T_max=1000)}``; see ``gradchain.schedule``. Not ``ReduceLROnPlateau``, which needs a metric.
    """

    def __init__(self, make: Mapping[str, Callable[..., LRScheduler]]) -> None:
        self.make = dict(make)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the schedulers, and let them catch up."""
        optimizer = innermost(kwargs["optimizer"])
        for group in optimizer.param_groups:
            group.update({key: group.pop(f"initial {key}") for key in self.make if f"initial {key}" in group})
        self.schedulers = [schedule(optimizer, key, make) for key, make in self.make.items()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the steps of the optimizer were made by the run before
            for _ in range(state.global_step):
                self._step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step."""
        self._step()

    def _step(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()
