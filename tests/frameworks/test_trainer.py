"""The Trainer of Hugging Face transformers, with a model that needs no download."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, LRScheduler, StepLR

from gradchain import ParamTransformingOptimizer, attach, schedule
from tests.frameworks.common import (
    CHAINS,
    Adapt,
    ByHand,
    assert_same,
    make_adamw,
    make_data,
    make_model,
    train,
    values,
)

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

ROWS = [{"x": x, "labels": y} for x, y in zip(*make_data(), strict=True)]
ALL = [make_data()] * 6  # every batch is the whole data, so that the order does not matter


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = make_model(seed)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.net(x)
        return {"loss": mse_loss(out, labels), "logits": out}


def make_trainer(
    model: nn.Module,
    path: Path,
    optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
    optimizer_cls_and_kwargs: Any = None,
    **kwargs: Any,
) -> Any:
    settings: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 32, "max_grad_norm": 0.0}
    settings |= {"save_strategy": "no", "logging_strategy": "no"}
    args = transformers.TrainingArguments(
        output_dir=str(path), use_cpu=True, report_to=[], disable_tqdm=True, **settings | kwargs
    )
    return transformers.Trainer(
        model,
        args,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        optimizers=optimizers,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
    )


def test_without_chains_it_is_the_bare_optimizer(adapt: Adapt, tmp_path: Path) -> None:
    bare, ours = Model(), Model()
    make_trainer(bare, tmp_path, (make_adamw(bare), None), per_device_train_batch_size=8).train()
    make_trainer(ours, tmp_path, (adapt(make_adamw(ours)), None), per_device_train_batch_size=8).train()
    assert_same(values(ours), values(bare))


@pytest.mark.parametrize(
    ("settings", "in_loop"),
    [
        ({}, {}),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 16}, {}),
        ({"max_grad_norm": 0.5}, {"max_norm": 0.5}),
    ],
)
def test_with_an_optimizer_and_a_scheduler(
    adapt: Adapt, tmp_path: Path, settings: dict[str, Any], in_loop: dict[str, Any]
) -> None:
    ours, model = Model(), make_model()
    optimizer = adapt(make_adamw(ours), **CHAINS)
    make_trainer(ours, tmp_path, (optimizer, StepLR(optimizer, 2, gamma=0.5)), **settings).train()
    inner = make_adamw(model)
    expected = train(model, ByHand(inner), data=ALL, schedulers=[StepLR(inner, 2, gamma=0.5)], **in_loop)
    torch.testing.assert_close(values(ours), expected)
    assert optimizer.param_groups[0]["lr"] == inner.param_groups[0]["lr"] == 0.05 * 0.5**3


def test_around_the_optimizer_that_it_makes(adapt: Adapt, tmp_path: Path) -> None:
    ours, model = Model(), Model()
    settings: dict[str, Any] = {"learning_rate": 0.05, "weight_decay": 0.1, "warmup_steps": 2}
    trainer = make_trainer(ours, tmp_path, **settings)
    trainer.optimizer = adapt(trainer.create_optimizer(), **CHAINS)
    trainer.train()
    reference = make_trainer(model, tmp_path, **settings)
    inner = reference.create_optimizer()
    scheduler = reference.create_scheduler(6, inner)
    torch.testing.assert_close(values(ours), train(model.net, ByHand(inner), data=ALL, schedulers=[scheduler]))
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]


def test_attached_to_the_optimizer_that_it_makes_in_one_line(tmp_path: Path) -> None:
    ours, model = Model(), Model()
    settings: dict[str, Any] = {"learning_rate": 0.05, "weight_decay": 0.1, "warmup_steps": 2}
    trainer = make_trainer(ours, tmp_path, **settings)
    attach(trainer.create_optimizer(), **CHAINS)
    trainer.train()
    reference = make_trainer(model, tmp_path, **settings)
    inner = reference.create_optimizer()
    scheduler = reference.create_scheduler(6, inner)
    torch.testing.assert_close(values(ours), train(model.net, ByHand(inner), data=ALL, schedulers=[scheduler]))


def test_attached_by_a_callback(tmp_path: Path) -> None:
    class Attach(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            attach(optimizer.optimizer, **CHAINS)

    ours, model = Model(), Model()
    settings: dict[str, Any] = {"learning_rate": 0.05, "max_grad_norm": 0.5}
    trainer = make_trainer(ours, tmp_path, **settings)
    trainer.add_callback(Attach())
    trainer.train()
    reference = make_trainer(model, tmp_path, **settings)
    inner = reference.create_optimizer()
    scheduler = reference.create_scheduler(6, inner)
    expected = train(model.net, ByHand(inner), data=ALL, schedulers=[scheduler], max_norm=0.5)
    torch.testing.assert_close(values(ours), expected)


def test_as_the_class_that_it_makes(tmp_path: Path) -> None:
    ours, model = Model(), Model()
    settings: dict[str, Any] = {"learning_rate": 0.05, "weight_decay": 0.1}
    kwargs = {"InnerOpt": AdamW, **CHAINS}
    make_trainer(ours, tmp_path, optimizer_cls_and_kwargs=(ParamTransformingOptimizer, kwargs), **settings).train()
    reference = make_trainer(model, tmp_path, optimizer_cls_and_kwargs=(AdamW, {}), **settings)
    inner = reference.create_optimizer()
    scheduler = reference.create_scheduler(6, inner)
    torch.testing.assert_close(values(ours), train(model.net, ByHand(inner), data=ALL, schedulers=[scheduler]))


def test_a_checkpoint_continues_where_it_was_saved(adapt: Adapt, tmp_path: Path) -> None:
    def make(seed: int, path: Path, **settings: Any) -> tuple[Model, Any]:
        model = Model(seed)
        optimizer = adapt(make_adamw(model), **CHAINS)
        pair = optimizer, StepLR(optimizer, 2, gamma=0.5)
        return model, make_trainer(model, path, pair, per_device_train_batch_size=8, **settings)

    whole, trainer = make(0, tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    resumed, again = make(1, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(values(resumed), values(whole))
    expected, state = (t.optimizer.state_dict()["state"] for t in (trainer, again))
    assert_same(state, expected)
    assert state[0]["transforms"].keys() == {"pre.ema.average", "post.param_ema.average"}


# found: 7
def test_attached_after_the_checkpoint_was_restored(tmp_path: Path) -> None:
    class Attach(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            attach(kwargs["optimizer"].optimizer, **CHAINS)

    def make(seed: int, path: Path, **settings: Any) -> tuple[Model, Any]:
        model = Model(seed)
        trainer = make_trainer(model, path, (make_adamw(model), None), per_device_train_batch_size=8, **settings)
        trainer.add_callback(Attach())
        return model, trainer

    whole, trainer = make(0, tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    resumed, again = make(1, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(values(resumed), values(whole))
    assert_same(again.optimizer.state_dict()["state"], trainer.optimizer.state_dict()["state"])


# found: 15
def test_schedules_of_hyperparameters_resume(adapt: Adapt, tmp_path: Path) -> None:
    key = "clip_by_global_norm.max_norm"

    def make(seed: int, path: Path, **settings: Any) -> tuple[Model, Any]:
        model = Model(seed)
        optimizer = adapt(make_adamw(model), **CHAINS)
        first: list[LRScheduler] = [StepLR(optimizer, 2, gamma=0.5), schedule(optimizer, key, ExponentialLR, gamma=0.9)]
        pair = optimizer, ChainedScheduler(first)
        return model, make_trainer(model, path, pair, per_device_train_batch_size=8, **settings)

    whole, trainer = make(0, tmp_path, save_strategy="steps", save_steps=3, logging_strategy="steps", logging_steps=1)
    trainer.train()
    resumed, again = make(1, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(values(resumed), values(whole))
    for each in (trainer, again):
        assert each.optimizer.param_groups[0][key] == pytest.approx(0.1 * 0.9**6)
        assert each.optimizer.param_groups[0]["lr"] == 0.05 * 0.5**3
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.05 * 0.5 ** (k // 2) for k in range(6)])  # not those of the hyperparameter


def test_bfloat16_autocast(adapt: Adapt, tmp_path: Path) -> None:
    bare, ours = Model(), Model()
    make_trainer(bare, tmp_path, (make_adamw(bare), None), bf16=True).train()
    make_trainer(ours, tmp_path, (adapt(make_adamw(ours)), None), bf16=True).train()
    assert_same(values(ours), values(bare))


def test_evaluation_with_averages(tmp_path: Path) -> None:
    model, plain = Model(), make_model()
    optimizer = ParamTransformingOptimizer(InnerOpt=make_adamw(model), **CHAINS)
    trainer = make_trainer(model, tmp_path, (optimizer, StepLR(optimizer, 2, gamma=0.5)))
    trainer.train()
    inner = make_adamw(plain)
    by_hand = ByHand(inner)
    train(plain, by_hand, data=ALL, schedulers=[StepLR(inner, 2, gamma=0.5)])
    with optimizer.averaged():
        loss = trainer.evaluate(ROWS)["eval_loss"]
    x, y = make_data()
    for p, average in zip(plain.parameters(), by_hand.averages, strict=True):
        p.data = average
    assert loss == pytest.approx(mse_loss(plain(x), y).item())
