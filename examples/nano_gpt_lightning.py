"""The GPT of ``nano_gpt.py`` under Lightning, in two processes with a replica each (DDP).

Lightning sees one optimizer, so that its automatic optimization, its schedulers and its checkpoints work as with any.
Run ``python examples/nano_gpt_lightning.py``.
"""

import tempfile
from typing import Any

import pytorch_lightning as pl  # pyright: ignore[reportMissingImports]
import torch
import torch.distributed as dist
from nano_gpt import GPT, STEPS, batch, make_optimizer, read_arguments  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from gradchain.integrations.lightning import LogMetrics


class Module(pl.LightningModule):  # type: ignore[misc, unused-ignore]
    """The model, whose batches depend on the step alone, so that a resumed run has those of one that goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT()
        self.losses: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.model)
        scheduler = CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, _: Any) -> Tensor:
        loss: Tensor = self.model(batch(self.global_step, self.global_rank, self.trainer.world_size))
        mean = loss.detach() / self.trainer.world_size
        dist.all_reduce(mean)
        self.losses.append(mean.item())
        return loss


def fit(*, stop: int = STEPS, checkpoint: str | None = None) -> tuple[pl.Trainer, list[float]]:
    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=stop,
        callbacks=[LogMetrics()],
        log_every_n_steps=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.zeros(STEPS), batch_size=None), ckpt_path=checkpoint)  # type: ignore[arg-type]
    return trainer, module.losses


def main() -> None:
    read_arguments()
    trainer, losses = fit()
    first, stopped = fit(stop=STEPS // 2)
    path = first.strategy.broadcast(tempfile.mkdtemp()) + "/half.ckpt"
    first.save_checkpoint(path)
    _, resumed = fit(checkpoint=path)
    if trainer.is_global_zero:
        print(f"losses: {' '.join(map(repr, losses))}")
        print(f"stopped and resumed, the losses are the same: {stopped + resumed == losses}")
        for key, value in trainer.logged_metrics.items():
            print(f"{key}: {value:.4g}")


if __name__ == "__main__":
    main()
