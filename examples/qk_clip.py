"""Keep the logits of attention bounded while it trains, as Kimi K2 does: a transform that reads a signal.

Where a head makes logits above ``TAU``, its query and key weights are scaled after the step, each by the square root of
``TAU / max_logit``, so that the logit becomes ``TAU`` (Kimi Team, Kimi K2: Open Agentic Intelligence,
https://arxiv.org/abs/2507.20534, 2025). The forward pass knows the largest logit of each head; ``signal`` gives it to
the step, and ``metrics`` shows what happens.

    python examples/qk_clip.py
"""

from __future__ import annotations

import argparse
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from gradchain import Group, ParamTransformingOptimizer, chain, clip_by_global_norm, masked, monitor, transform

HEADS, WIDTH, LENGTH = 4, 32, 16
TAU = 5.0


@transform(acts_on="tensor")
def qk_clip(tensor: Tensor, group: Group, tau: Annotated[float, Gt(0)]) -> Tensor:
    """Scale the rows of each head, (heads * d, ...), so that its largest logit, ``group["max_logit"]``, is ``tau``."""
    excess: Tensor = (group["max_logit"] / tau).clamp_min(1)  # (heads,)
    heads = tensor.unflatten(0, (HEADS, -1)) / excess.sqrt().reshape(-1, *[1] * tensor.ndim)
    scaled: Tensor = heads.flatten(0, 1)
    return scaled


class Attention(nn.Module):
    """One layer of causal attention, which looks for the token that came after the last occurrence of this one."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, WIDTH)
        self.place = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, tokens)
        self.max_logit = torch.zeros(HEADS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token, (batch, length, tokens); the largest of the attention stay in ``max_logit``."""
        x = self.embed(tokens) + self.place
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        logits = q @ k.mT / q.shape[-1] ** 0.5
        self.max_logit = logits.detach().amax((0, 2, 3))
        future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        mixed = logits.masked_fill(future, -torch.inf).softmax(-1) @ v
        result: Tensor = self.out(x + mixed.transpose(1, 2).flatten(2))
        return result


def train(steps: int, tau: float) -> float:
    """Train with logits of at most about ``tau``, and return the largest of the last step."""
    torch.manual_seed(0)
    model = Attention(tokens=8)
    optimizer = ParamTransformingOptimizer(
        model.named_parameters(),
        torch.optim.Adam,
        pre=chain(monitor(), clip_by_global_norm(1.0)),
        post=masked(qk_clip(tau), lambda group: group["name"] in ("query.weight", "key.weight")),
        lr=3e-2,
    )
    for step in range(1, steps + 1):
        tokens = torch.randint(8, (32, LENGTH + 1))
        tokens[:, 1::2] = (3 * tokens[:, 0:-1:2] + 1) % 8
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.signal(max_logit=model.max_logit, reduce="max")
        optimizer.step()
        if step % (steps // 4) == 0:
            shown = {key: round(value, 3) for key, value in optimizer.metrics().items() if "nonfinite" not in key}
            print(f"tau {tau}, step {step}: loss {loss:.3f}, max_logit {model.max_logit.max():.2f}, {shown}")
    return float(model.max_logit.max())


def main() -> None:
    """Compare with training without a bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps
    free, clipped = train(steps, float("inf")), train(steps, TAU)
    print(f"largest logit: free {free:.2f}, clipped {clipped:.2f}")


if __name__ == "__main__":
    main()
