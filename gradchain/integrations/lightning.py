"""Callbacks for the Trainer of Lightning; see ``gradchain.integrations``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from gradchain.adapters.attach import attach
from gradchain.adapters.scheduler import schedule
from gradchain.integrations import handle_of, hyperparameters_of

_BOTH_NAMES = ("lightning.pytorch", "pytorch_lightning")  # of the same package, and the classes of each are its own
_NAME = next((name for name in _BOTH_NAMES if name in sys.modules), _BOTH_NAMES[find_spec("lightning") is None])
_lightning: Any = import_module(_NAME)


class AttachTransforms(_lightning.Callback):  # type: ignore[misc, unused-ignore]
    """Attach chains to each optimizer of the module, with the names that parameters have in the module.

    It does so before Lightning restores a checkpoint, so that a resumed run has the states of the transforms.

    Args:
        **options: The arguments of ``gradchain.attach``, such as ``pre``, ``update``, ``post`` and ``param_ndim``.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach."""
        for optimizer in trainer.optimizers:
            attach(optimizer, model=pl_module, **self.options)


class EvaluateAverages(_lightning.Callback):  # type: ignore[misc, unused-ignore]
    """Validate with the averages of the parameters, which ``param_ema`` or ``lookahead`` keep in ``post``."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Give the parameters their averages."""
        self.stack = ExitStack()
        for optimizer in trainer.optimizers:
            self.stack.enter_context(handle_of(optimizer).averaged())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the parameters their own values back."""
        self.stack.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Do so, too, where validation fails."""
        self.__dict__.pop("stack", ExitStack()).close()


class LogMetrics(_lightning.Callback):  # type: ignore[misc, unused-ignore]
    """Log what ``metrics()`` of the optimizers returns, and their hyperparameters, as often as the Trainer logs."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log."""
        if trainer.global_step % trainer.log_every_n_steps == 0:
            for optimizer in trainer.optimizers:
                pl_module.log_dict({**handle_of(optimizer).metrics(), **hyperparameters_of(optimizer)})


class ScheduleHyperparameters(_lightning.Callback):  # type: ignore[misc, unused-ignore]
    """Let schedulers drive hyperparameters of the first optimizer, beside those of the learning rate.

    Lightning steps, saves and loads them with its own. Where chains are attached, put it behind ``AttachTransforms``.

    Args:
        make: What makes the scheduler of each key, such as ``{"clip_by_norm.max_norm": partial(CosineAnnealingLR,
            T_max=1000)}``; see ``gradchain.schedule``.
        interval: ``"step"`` or ``"epoch"``, how often they step.
    """

    def __init__(self, make: Mapping[str, Callable[..., LRScheduler]], interval: str = "step") -> None:
        self.make = dict(make)
        self.interval = interval

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the schedulers."""
        make_config = import_module(f"{_NAME}.utilities.types").LRSchedulerConfig
        for key, make in self.make.items():
            config = make_config(schedule(trainer.optimizers[0], key, make), interval=self.interval)
            trainer.strategy.lr_scheduler_configs.append(config)
