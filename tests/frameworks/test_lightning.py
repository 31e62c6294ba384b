"""Lightning: automatic and manual optimisation, and Fabric."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LRScheduler,
    ReduceLROnPlateau,
    StepLR,
)
from torch.utils.data import DataLoader, TensorDataset

from gradchain import ParamTransformingOptimizer, attach, chain, clip_by_norm, schedule, sign, skip_nonfinite
from tests.frameworks.common import (
    CHAINS,
    Adapt,
    ByHand,
    assert_same,
    batches,
    make_adamw,
    make_data,
    make_model,
    make_scaler,
    train,
    train_amp,
    train_with_closure,
    unwrapped,
    values,
)

pl = pytest.importorskip("pytorch_lightning")

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:GPU available but not used"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]

MakeOptimizer = Callable[[nn.Module], Any]


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, make_optimizer: MakeOptimizer, *, manual: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.net: Any = make_model(seed)
        self.make_optimizer = make_optimizer
        self.automatic_optimization = not manual

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.net)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Any:
        x, y = batch
        loss = mse_loss(self.net(x), y)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5)
        optimizer.step()
        return None


def fit(module: Any, *, ckpt_path: Path | None = None, validate: bool = False, **kwargs: Any) -> Any:
    kwargs = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, **kwargs}
    trainer = pl.Trainer(enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **kwargs)
    loader = DataLoader(TensorDataset(*make_data()), batch_size=8)
    trainer.fit(module, loader, loader if validate else None, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("manual", [False, True])
def test_without_chains_it_is_the_bare_optimizer(adapt: Adapt, manual: bool) -> None:
    bare, ours = Module(make_adamw, manual=manual), Module(lambda net: adapt(make_adamw(net)), manual=manual)
    fit(bare)
    fit(ours)
    assert_same(values(ours), values(bare))


@pytest.mark.parametrize(
    ("in_trainer", "in_loop"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ({"gradient_clip_val": 0.5}, {"max_norm": 0.5}),
    ],
)
def test_automatic_optimization(adapt: Adapt, in_trainer: dict[str, Any], in_loop: dict[str, Any]) -> None:
    module = Module(lambda net: adapt(make_adamw(net), **CHAINS))
    fit(module, **in_trainer)
    model = make_model()
    torch.testing.assert_close(values(module), train(model, ByHand(make_adamw(model)), **in_loop))


def test_manual_optimization(adapt: Adapt) -> None:
    module = Module(lambda net: adapt(make_adamw(net), **CHAINS), manual=True)
    fit(module)
    model = make_model()
    torch.testing.assert_close(values(module), train(model, ByHand(make_adamw(model)), max_norm=0.5))


def test_manual_optimization_with_a_closure(adapt: Adapt) -> None:
    class WithClosure(Module):
        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                loss = mse_loss(self.net(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            assert optimizer.step(closure=closure).requires_grad

    module = WithClosure(lambda net: adapt(make_adamw(net), **CHAINS), manual=True)
    fit(module)
    model = make_model()
    torch.testing.assert_close(values(module), train(model, ByHand(make_adamw(model))))


def test_two_optimizers_that_take_turns(adapt: Adapt) -> None:
    class TakeTurns(Module):
        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            optimizer = self.optimizers()[index % 2]
            with optimizer.toggle_model():
                loss = mse_loss(self.net(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    def make_two(wrap: Callable[[Optimizer], Any]) -> MakeOptimizer:
        return lambda net: [wrap(SGD(net[i].parameters(), lr=0.1)) for i in (0, 2)]  # type: ignore[index]

    module = TakeTurns(make_two(lambda inner: adapt(inner, **CHAINS)), manual=True)
    fit(module)
    model = make_model()
    by_hand = make_two(ByHand)(model)
    for index, (x, y) in enumerate(batches()):
        model.zero_grad()
        mse_loss(model(x), y).backward()
        by_hand[index % 2].step()
    torch.testing.assert_close(values(module), values(model))


def test_schedulers(adapt: Adapt, tmp_path: Path) -> None:
    lrs = []

    class Record(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            optimizer = trainer.optimizers[0]
            lrs.append([o.param_groups[0]["lr"] for o in (optimizer, getattr(optimizer, "inner_opt", optimizer))])

    def with_scheduler(net: nn.Module) -> Any:
        optimizer = adapt(make_adamw(net), **CHAINS)
        return [optimizer], [{"scheduler": StepLR(optimizer, 3, gamma=0.1), "interval": "step"}]

    module = Module(with_scheduler)
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(module, callbacks=[pl.callbacks.LearningRateMonitor(), Record()], logger=logger, log_every_n_steps=1)
    model = make_model()
    inner = make_adamw(model)
    expected = train(model, ByHand(inner), schedulers=[StepLR(inner, 3, gamma=0.1)])
    torch.testing.assert_close(values(module), expected)
    torch.testing.assert_close(lrs, [[0.05 * 0.1 ** (k // 3)] * 2 for k in range(1, 9)])


@pytest.mark.parametrize("pre", [None, skip_nonfinite()])
def test_lbfgs_gets_the_closure(adapt: Adapt, pre: Any) -> None:
    bare, ours = (
        Module(lambda net, wrap=wrap: wrap(LBFGS(net.parameters(), max_iter=4)))  # type: ignore[misc]
        for wrap in (unwrapped, partial(adapt, pre=pre))
    )
    fit(bare)
    fit(ours)
    assert_same(values(ours), values(bare))


def test_a_checkpoint_continues_where_it_was_saved(adapt: Adapt, tmp_path: Path) -> None:
    def with_scheduler(net: nn.Module) -> Any:
        optimizer = adapt(make_adamw(net), **CHAINS)
        return [optimizer], [StepLR(optimizer, 1, gamma=0.5)]

    whole, first, second = Module(with_scheduler), Module(with_scheduler), Module(with_scheduler, seed=1)
    expected = fit(whole, max_epochs=4).optimizers[0].state_dict()
    fit(first).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(second, max_epochs=4, ckpt_path=tmp_path / "half.ckpt").optimizers[0].state_dict()
    assert_same(values(second), values(whole))
    assert_same(resumed["state"], expected["state"])
    assert resumed["state"][0]["transforms"].keys() == {"pre.ema.average", "post.param_ema.average"}


# found: 7
def test_attached_after_the_checkpoint_was_restored(tmp_path: Path) -> None:
    class Attach(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            attach(trainer.optimizers[0], **CHAINS)

    whole, first, second = (Module(make_adamw, seed=seed) for seed in (0, 0, 1))
    expected = fit(whole, max_epochs=4, callbacks=[Attach()]).optimizers[0].state_dict()["state"]
    fit(first, callbacks=[Attach()]).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(second, max_epochs=4, callbacks=[Attach()], ckpt_path=tmp_path / "half.ckpt")
    assert_same(values(second), values(whole))
    assert_same(resumed.optimizers[0].state_dict()["state"], expected)


# found: 15
def test_schedules_of_hyperparameters_resume(adapt: Adapt, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[float, float]]] = {}

    class Record(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            group = trainer.optimizers[0].param_groups[0]
            seen.setdefault(module.name, []).append((group["lr"], group["clip_by_global_norm.max_norm"]))

    def with_schedulers(net: nn.Module) -> Any:
        optimizer = adapt(make_adamw(net), **CHAINS)
        key = "clip_by_global_norm.max_norm"
        in_one: list[LRScheduler] = [
            StepLR(optimizer, 3, gamma=0.5),
            schedule(optimizer, key, ExponentialLR, gamma=0.9),
        ]
        plateau = schedule(optimizer, "project_linf_ball.radius", ReduceLROnPlateau, patience=0, factor=0.5)
        return [optimizer], [
            {"scheduler": ChainedScheduler(in_one), "interval": "step"},
            {"scheduler": schedule(optimizer, "scale.factor", CosineAnnealingLR, T_max=8), "interval": "epoch"},
            {"scheduler": plateau, "monitor": "worse"},
        ]

    class Worse(Module):
        def on_train_epoch_end(self) -> None:
            self.log("worse", torch.tensor(float(self.current_epoch)))

    def make(name: str, seed: int = 0) -> Any:
        module = Worse(with_schedulers, seed=seed)
        module.name = name
        return module

    whole, first, second = make("whole"), make("first"), make("second", seed=1)
    kwargs: dict[str, Any] = {"callbacks": [Record()]}
    groups = fit(whole, max_epochs=4, **kwargs).optimizers[0].param_groups
    fit(first, **kwargs).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(second, max_epochs=4, ckpt_path=tmp_path / "half.ckpt", **kwargs).optimizers[0].param_groups
    torch.testing.assert_close(seen["whole"], [(0.05 * 0.5 ** (k // 3), 0.1 * 0.9**k) for k in range(16)])
    assert seen["first"] + seen["second"] == seen["whole"]
    assert groups[0]["scale.factor"] == pytest.approx(0.25)  # half way down from 0.5
    assert groups[0]["project_linf_ball.radius"] == pytest.approx(0.3 * 0.5**3)
    assert [{k: v for k, v in g.items() if k != "params"} for g in resumed] == [
        {k: v for k, v in g.items() if k != "params"} for g in groups
    ]
    assert_same(values(second), values(whole))


def test_its_view_of_the_optimizer() -> None:
    seen: list[list[Tensor]] = []

    class Evaluates(Module):
        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            optimizer: Any = self.optimizers()
            assert issubclass(type(optimizer), ParamTransformingOptimizer)
            assert optimizer.param_groups is optimizer.optimizer.param_groups
            assert optimizer.state is optimizer.optimizer.state
            with optimizer.averaged():
                seen.append(values(self))

    module = Evaluates(lambda net: ParamTransformingOptimizer(InnerOpt=make_adamw(net), **CHAINS))
    fit(module, validate=True)
    model = make_model()
    by_hand = ByHand(make_adamw(model))
    torch.testing.assert_close(values(module), train(model, by_hand))
    torch.testing.assert_close(seen[-1], by_hand.averages)


@pytest.mark.one_optimizer
def test_added_from_outside_by_a_callback(adapt: Adapt) -> None:
    class Attach(pl.Callback):  # type: ignore[misc, name-defined]
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            trainer.optimizers = [adapt(optimizer, **CHAINS) for optimizer in trainer.optimizers]

    def with_scheduler(net: nn.Module) -> Any:
        optimizer = make_adamw(net)
        return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 1, gamma=0.5)}

    module = Module(with_scheduler)
    fit(module, callbacks=[Attach()])
    model = make_model()
    inner = make_adamw(model)
    by_hand, scheduler = ByHand(inner), StepLR(inner, 1, gamma=0.5)
    for epoch in (batches()[:4], batches()[4:]):
        train(model, by_hand, data=epoch)
        scheduler.step()
    torch.testing.assert_close(values(module), values(model))


def test_attached_to_an_unmodified_module_in_one_line(tmp_path: Path) -> None:
    class Attach(pl.Callback):  # type: ignore[misc, name-defined]
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            attach(trainer.optimizers[0], **CHAINS)

    whole, first, second = Module(make_adamw), Module(make_adamw), Module(make_adamw, seed=1)
    fit(whole, callbacks=[Attach()], max_epochs=4, gradient_clip_val=0.5)
    model = make_model()
    expected = train(model, ByHand(make_adamw(model)), data=batches() * 2, max_norm=0.5)
    torch.testing.assert_close(values(whole), expected)
    fit(first, callbacks=[Attach()], gradient_clip_val=0.5).save_checkpoint(tmp_path / "half.ckpt")
    path = tmp_path / "half.ckpt"
    fit(second, callbacks=[Attach()], max_epochs=4, gradient_clip_val=0.5, ckpt_path=path)
    assert_same(values(second), values(whole))


def test_attached_to_the_optimizer_that_lightning_shows() -> None:
    class Attaches(Module):
        def on_train_start(self) -> None:
            optimizer: Any = self.optimizers()
            with pytest.raises(TypeError, match="attach to that, its .optimizer"):
                attach(optimizer, **CHAINS)
            attach(optimizer.optimizer, **CHAINS)

    module, model = Attaches(make_adamw), make_model()
    fit(module)
    torch.testing.assert_close(values(module), train(model, ByHand(make_adamw(model))))


@pytest.mark.parametrize(
    ("callback", "kwargs"),
    [
        ("StochasticWeightAveraging", {"swa_lrs": 0.01, "swa_epoch_start": 2}),
        ("EMAWeightAveraging", {"decay": 0.9}),
        ("GradientAccumulationScheduler", {"scheduling": {0: 2, 1: 4}}),
        ("BackboneFinetuning", {"unfreeze_backbone_at_epoch": 1}),  # adds a param group
    ],
)
@pytest.mark.one_optimizer
def test_callbacks_that_touch_the_optimizer(adapt: Adapt, callback: str, kwargs: dict[str, Any]) -> None:
    class WithBackbone(Module):
        @property
        def backbone(self) -> Any:
            return self.net[0]

    def head(net: Any) -> Optimizer:
        return SGD(net[2].parameters(), lr=0.05, momentum=0.9)

    bare, ours = WithBackbone(head), WithBackbone(lambda net: adapt(head(net)))
    for module in (bare, ours):
        fit(module, max_epochs=4, callbacks=[getattr(pl.callbacks, callback)(**kwargs)])
    assert_same(values(ours), values(bare))
    chained = WithBackbone(lambda net: adapt(head(net), **CHAINS))
    trainer = fit(chained, max_epochs=4, callbacks=[getattr(pl.callbacks, callback)(**kwargs)])
    assert all(group["project_linf_ball.radius"] == 0.3 for group in trainer.optimizers[0].param_groups)
    assert len(trainer.optimizers[0].param_groups) == (2 if callback == "BackboneFinetuning" else 1)


def test_bfloat16_autocast_and_parameters(adapt: Adapt) -> None:
    for precision in ("bf16-mixed", "bf16-true"):
        bare = Module(make_adamw)
        ours = Module(lambda net: adapt(make_adamw(net)))
        chained = Module(lambda net: adapt(make_adamw(net), **CHAINS))
        for module in (bare, ours, chained):
            fit(module, precision=precision)
        assert_same(values(ours), values(bare))
        assert all(p.isfinite().all() and p.abs().max() <= 0.31 for p in chained.parameters())


@pytest.mark.parametrize("overflow_at", [None, 3])
def test_float16_with_a_gradient_scaler(adapt: Adapt, overflow_at: int | None) -> None:
    class Overflows(Module):
        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Any:
            loss = super().training_step(batch, index)
            return loss * torch.inf if self.global_step == overflow_at else loss

    def in_float16() -> dict[str, Any]:
        plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", make_scaler())
        return {"plugins": [plugin], "gradient_clip_val": 0.5}

    bare, ours = Overflows(make_adamw), Overflows(lambda net: adapt(make_adamw(net)))
    fit(bare, **in_float16())
    fit(ours, **in_float16())
    assert_same(values(ours), values(bare))
    chained, model = Overflows(lambda net: adapt(make_adamw(net), **CHAINS)), make_model()
    fit(chained, **in_float16())
    expected = train_amp(model, ByHand(make_adamw(model)), make_scaler(), max_norm=0.5, overflow_at=overflow_at)
    torch.testing.assert_close(values(chained), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_float16_on_cuda(adapt: Adapt) -> None:
    bare, ours = Module(make_adamw), Module(lambda net: adapt(make_adamw(net)))
    for module in (bare, ours):
        fit(module, precision="16-mixed", accelerator="gpu", devices=1, gradient_clip_val=0.5)
    assert_same(values(ours), values(bare))


# Fabric


@pytest.fixture
def fabric() -> Any:
    return pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)


def run(fabric: Any, model_and_optimizer: tuple[Any, Any], data: list[tuple[Tensor, Tensor]]) -> None:
    model, optimizer = model_and_optimizer
    for x, y in data:
        optimizer.zero_grad()
        fabric.backward(mse_loss(model(x), y))
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()


def test_fabric(adapt: Adapt, fabric: Any) -> None:
    net = make_model()
    run(fabric, fabric.setup(net, adapt(make_adamw(net), **CHAINS)), batches())
    model = make_model()
    torch.testing.assert_close(values(net), train(model, ByHand(make_adamw(model)), max_norm=0.5))


def test_fabric_closure(adapt: Adapt, fabric: Any) -> None:
    nets = [make_model(), make_model()]
    for net, wrap in zip(nets, (unwrapped, adapt), strict=True):
        model, optimizer = fabric.setup(net, wrap(Adam(net.parameters())))
        train_with_closure(model, optimizer, fabric.backward)
    assert_same(values(nets[1]), values(nets[0]))


def test_fabric_checkpoint(fabric: Any, tmp_path: Path) -> None:
    def start(seed: int) -> tuple[Any, Any]:
        net = make_model(seed)
        state: tuple[Any, Any] = fabric.setup(net, ParamTransformingOptimizer(InnerOpt=make_adamw(net), **CHAINS))
        return state

    whole, first, second = start(0), start(0), start(1)
    run(fabric, whole, batches())
    run(fabric, first, batches()[:3])
    fabric.save(tmp_path / "some.ckpt", dict(zip(("model", "optimizer"), first, strict=True)))
    fabric.load(tmp_path / "some.ckpt", dict(zip(("model", "optimizer"), second, strict=True)))
    run(fabric, second, batches()[3:])
    assert_same(values(second[0]), values(whole[0]))
    for model, optimizer in (whole, second):
        with optimizer.averaged():
            averages = values(model)
    with whole[1].averaged():
        assert_same(values(whole[0]), averages)


# found: 40
def test_explain_and_a_new_chain_in_a_hook() -> None:
    class Looks(Module):
        def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
            shown: Any = self.optimizers()
            self.table = str(shown.explain())
            if self.global_step == 3:
                shown.pre = chain(clip_by_norm(1e-3))

    module = Looks(lambda net: ParamTransformingOptimizer(InnerOpt=SGD(net.parameters(), lr=0.1), pre=sign()))
    trainer = fit(module)
    assert "clip_by_norm(max_norm=0.001)" in module.table
    assert trainer.optimizers[0].pre == chain(clip_by_norm(1e-3))
    model = make_model()
    optimizer = ParamTransformingOptimizer(InnerOpt=SGD(model.parameters(), lr=0.1), pre=sign())
    train(model, optimizer, data=batches()[:3])
    optimizer.pre = chain(clip_by_norm(1e-3))
    assert_same(values(module), train(model, optimizer, data=batches()[3:]))
