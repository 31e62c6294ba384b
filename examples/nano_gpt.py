"""A small GPT with two optimizers as one: Muon for the hidden matrices, AdamW for embeddings, head and norms.

One clip acts by the norm of all gradients, one cosine schedule drives both learning rates, ``monitor`` shows that norm,
and one checkpoint goes on bit for bit. The file ``nano_gpt.yaml`` describes the whole optimizer.

Run ``python examples/nano_gpt.py`` for one process, ``torchrun --nproc-per-node 2 examples/nano_gpt.py`` for a model in
two shards (FSDP2), or ``python examples/nano_gpt_lightning.py`` for two replicas (DDP) under Lightning. All three have
the same losses: to 1e-5 with ``--float32``, which lets ``torch.optim.Muon`` compute in float32, and to 2e-3 without it,
since Muon rounds what it computes to bfloat16. A run takes some seconds on two cores and downloads nothing: the text is
Python's own documentation.
"""

import argparse
import os
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.overrides import TorchFunctionMode

from gradchain import ParamTransformingOptimizer, from_config

TEXT = "\n".join(topics[key] for key in sorted(topics))[:200_000]
LETTERS = sorted(set(TEXT))
TOKENS = torch.tensor([LETTERS.index(letter) for letter in TEXT])
WIDTH, HEADS, CONTEXT, BATCH, STEPS = 64, 4, 64, 16, 24


class Block(nn.Module):
    """Attention, then two layers, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        sizes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
        self.hidden = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.hidden["qkv"](self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attention = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.hidden["out"](attention.transpose(1, 2).flatten(2))
        result: Tensor = x + self.hidden["down"](self.hidden["up"](self.norms[1](x)).relu().square())
        return result


class GPT(nn.Module):
    """The mean loss of the next letter, of pieces of text of shape (batch, CONTEXT + 1)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.letters = nn.Embedding(len(LETTERS), WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(LETTERS))

    def forward(self, text: Tensor) -> Tensor:
        x = self.letters(text[:, :-1]) + self.places(torch.arange(CONTEXT))
        for block in self.blocks:
            x = block(x)
        return cross_entropy(self.head(self.norm(x)).flatten(0, 1), text[:, 1:].flatten())


def batch(step: int, rank: int = 0, size: int = 1) -> Tensor:
    """The pieces of text of a step, of which each process takes its share."""
    starts = torch.randint(len(TOKENS) - CONTEXT - 1, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    return TOKENS[starts + torch.arange(CONTEXT + 1)][rank::size]


def make_optimizer(model: nn.Module) -> ParamTransformingOptimizer:
    """The optimizer that the YAML file describes."""
    config = yaml.safe_load(Path(__file__).with_name("nano_gpt.yaml").read_text())
    optimizer: ParamTransformingOptimizer = from_config(config, model.named_parameters(), allow=["torch.optim"])
    return optimizer


class Run:
    """A model, its optimizer and its scheduler, in one process or in shards."""

    def __init__(self) -> None:
        self.model = GPT()
        if dist.is_initialized():
            for module in (*self.model.blocks, self.model):
                fully_shard(module)
        self.optimizer = make_optimizer(self.model)
        self.scheduler = CosineAnnealingLR(self.optimizer, STEPS)

    def train(self, steps: range) -> list[float]:
        """Make steps, and return the loss of each over all processes."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        losses = []
        for step in steps:
            self.optimizer.zero_grad()
            loss = self.model(batch(step, rank, size))
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            mean = loss.detach() / size
            if size > 1:
                dist.all_reduce(mean)
            losses.append(mean.item())
        return losses

    def save(self, folder: str) -> None:
        """Save all that the run goes on from."""
        if dist.is_initialized():
            checkpoint.save(self._states(), checkpoint_id=folder)  # type: ignore[attr-defined]
        else:
            torch.save(self._states(), f"{folder}/states.pt")

    def load(self, folder: str) -> None:
        """Go on from there."""
        if dist.is_initialized():
            states = self._states()
            checkpoint.load(states, checkpoint_id=folder)  # type: ignore[attr-defined]
        else:
            states = torch.load(f"{folder}/states.pt")
        set_state_dict(
            self.model, self.optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
        )
        self.scheduler.load_state_dict(states["scheduler"])

    def _states(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}


class InFloat32(TorchFunctionMode):
    """From where it is entered on, what would be rounded to bfloat16 is in float32. Muon has no option for it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        named = {key: torch.float32 if value is torch.bfloat16 else value for key, value in (kwargs or {}).items()}
        return function(*args, **named)


def read_arguments() -> None:
    """Read the one option, and do what it says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--float32", action="store_true", help="let Muon compute in float32, and not in bfloat16")
    if parser.parse_args().float32:
        InFloat32().__enter__()  # type: ignore[no-untyped-call]


def main() -> None:
    read_arguments()
    if "RANK" in os.environ:  # torchrun sets it
        dist.init_process_group("gloo")

    whole = Run()
    losses = whole.train(range(STEPS))

    folder = [tempfile.mkdtemp()]
    if dist.is_initialized():
        dist.broadcast_object_list(folder)
    first, second = Run(), Run()
    stopped = first.train(range(STEPS // 2))
    first.save(folder[0])
    second.load(folder[0])
    resumed = second.train(range(STEPS // 2, STEPS))

    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"losses: {' '.join(map(repr, losses))}")
        print(f"stopped and resumed, the losses are the same: {stopped + resumed == losses}")
        for key, value in whole.optimizer.metrics().items():
            print(f"{key}: {value:.4g}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
