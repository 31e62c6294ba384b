"""The callbacks of ``gradchain.integrations``."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

from gradchain import ParamTransformingOptimizer, chain, clip_by_global_norm, ema, masked, monitor, param_ema
from tests.frameworks.common import assert_same, make_adamw, make_data, values
from tests.frameworks.test_lightning import Module, fit, pytestmark  # noqa: F401
from tests.frameworks.test_trainer import Model, make_trainer
from tests.nano_gpt import LARGEST_DIFFERENCE, losses_of, run_nano_gpt

lightning = pytest.importorskip("gradchain.integrations.lightning")
transformers = pytest.importorskip("gradchain.integrations.transformers")

CHAINS: dict[str, Any] = {
    "pre": chain(masked(ema(0.5), "*weight"), monitor(), clip_by_global_norm(0.1)),
    "post": param_ema(0.5, debias=False),
}
KEY = "clip_by_global_norm.max_norm"
MAKE = {KEY: partial(ExponentialLR, gamma=0.5), "ema.decay": partial(CosineAnnealingLR, T_max=4)}


class Validates(Module):
    """Remembers with which parameters it was validated, and the hyperparameters of each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.validated: list[list[Tensor]] = []
        self.norms: list[float] = []

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.norms.append(self.trainer.optimizers[0].param_groups[0].get(KEY))

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.validated.append(values(self))


def callbacks() -> list[Any]:
    schedules = lightning.ScheduleHyperparameters(MAKE)
    return [lightning.AttachTransforms(**CHAINS), lightning.EvaluateAverages(), lightning.LogMetrics(), schedules]


def test_lightning_resumes_with_states_and_schedules(tmp_path: Path) -> None:
    whole, first, second = (Validates(make_adamw, seed=seed) for seed in (0, 0, 1))
    fit(whole, max_epochs=4, callbacks=callbacks(), validate=True)
    path = tmp_path / "half.ckpt"
    fit(first, max_epochs=2, callbacks=callbacks(), validate=True).save_checkpoint(path)
    fit(second, max_epochs=4, callbacks=callbacks(), validate=True, ckpt_path=path)
    assert_same(values(second), values(whole))
    assert first.norms + second.norms == whole.norms == pytest.approx([0.1 * 0.5**k for k in range(16)])


def test_lightning_validates_with_averages() -> None:
    module, last = Validates(make_adamw), []

    class Averages(lightning._lightning.Callback):  # type: ignore[misc, name-defined]
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            last.append(values(pl_module))
            with lightning.handle_of(trainer.optimizers[0]).averaged():
                last.append(values(pl_module))

    attaching, evaluating, _, _ = callbacks()
    fit(module, validate=True, callbacks=[attaching, evaluating, Averages()])
    own, averages = last[-2:]
    assert_same(module.validated[-1], averages)
    assert_same(own, values(module))
    assert not all(map(torch.equal, own, averages))


def test_lightning_logs(tmp_path: Path) -> None:
    logger = lightning._lightning.loggers.CSVLogger(tmp_path)
    trainer = fit(Module(make_adamw), callbacks=callbacks(), logger=logger, log_every_n_steps=2)
    logged = trainer.logged_metrics
    assert logged["pre/monitor/norm"] > 0
    assert logged[KEY] == pytest.approx(0.1 * 0.5**8)
    assert logged["lr"] == pytest.approx(0.05)
    assert 0 <= logged["pre/clip_by_global_norm/share_clipped"] <= 1


def make(seed: int, path: Path, **settings: Any) -> tuple[Model, Any]:
    model = Model(seed)
    trainer = make_trainer(model, path, (make_adamw(model), None), per_device_train_batch_size=8, **settings)
    trainer.add_callback(transformers.AttachTransforms(**CHAINS))
    trainer.add_callback(transformers.ScheduleHyperparameters(MAKE))
    trainer.add_callback(transformers.EvaluateAverages())
    trainer.add_callback(transformers.LogMetrics(trainer))
    return model, trainer


def test_trainer_resumes_with_states_and_schedules(tmp_path: Path) -> None:
    logs: dict[str, Any] = {"logging_strategy": "steps", "logging_steps": 1}
    whole, trainer = make(0, tmp_path, save_strategy="steps", save_steps=3, **logs)
    trainer.train()
    resumed, again = make(1, tmp_path / "again", **logs)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(values(resumed), values(whole))
    for each in (trainer, again):
        norms = {entry["step"]: entry[KEY] for entry in each.state.log_history if KEY in entry}
        assert norms == pytest.approx({step: 0.1 * 0.5**step for step in range(1, 7)})


def test_trainer_trains_twice(tmp_path: Path) -> None:
    _, trainer = make(0, tmp_path)
    trainer.train()
    trainer.train()
    assert repr(transformers.handle_of(trainer.optimizer)).count("clip_by_global_norm") == 1


def test_trainer_evaluates_with_averages_and_logs(tmp_path: Path) -> None:
    model, trainer = make(0, tmp_path, eval_strategy="steps", eval_steps=3, logging_strategy="steps", logging_steps=3)
    expected = []

    class Averages(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            x, y = make_data()
            with transformers.handle_of(kwargs["optimizer"]).averaged():
                expected.append(mse_loss(model.net(x), y).item())
            expected.append(mse_loss(model.net(x), y).item())

    trainer.add_callback(Averages())
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses == pytest.approx(expected[::2])
    assert losses != pytest.approx(expected[1::2])
    logged = [entry for entry in trainer.state.log_history if "pre/monitor/norm" in entry]
    assert [entry["step"] for entry in logged] == [3, 6]
    assert all(entry["pre/monitor/norm"] > 0 and 0 <= entry["lr"] < 0.05 for entry in logged)


def test_without_transforms() -> None:
    model = Model()
    with pytest.raises(RuntimeError, match="AdamW has no transforms; .*put AttachTransforms before"):
        transformers.handle_of(make_adamw(model))
    optimizer = ParamTransformingOptimizer(InnerOpt=make_adamw(model), model=model, **CHAINS)
    assert transformers.handle_of(optimizer) is optimizer


@pytest.mark.parametrize("options", LARGEST_DIFFERENCE)
def test_nano_gpt(options: tuple[str, ...]) -> None:
    whole = losses_of(run_nano_gpt("nano_gpt.py", *options))
    replicated = losses_of(run_nano_gpt("nano_gpt_lightning.py", *options))
    assert replicated == pytest.approx(whole, rel=0, abs=LARGEST_DIFFERENCE[options])
