"""Random transforms. Each draws from a generator of its own, which is part of its state.

The numbers are drawn on the CPU, whatever the device of the tensor, and depend on the seed, on the step and on the
position of the parameter in its optimizer, ``group["index"]``. So they are the same in every replica of a distributed
training, and go on where a checkpoint was made, whatever else draws random numbers.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Generator, Tensor

from gradchain.contract import Group, State
from gradchain.transform import transform


def _seeded(name: str) -> Callable[..., State]:
    """What makes the first state of the transform ``name``, whose stream differs from that of the others."""

    def init(tensor: Tensor, group: Group, *, seed: int, **_: Any) -> State:
        # Generators of the CPU tell only 2^32 seeds apart: with sums, all parameters of an optimizer differ for sure.
        stream = (zlib.crc32(f"{name} {int(seed)} {group.get('slot')}".encode()) + group.get("index", 0)) % 2**32
        generator = Generator().manual_seed(stream)
        return {"generator": generator.get_state(), "step": tensor.new_zeros((), dtype=torch.int64)}

    return init


def _draw(sampler: str, tensor: Tensor, state: State, dtype: torch.dtype) -> tuple[Tensor, State]:
    """Random numbers like ``tensor`` from the generator of ``state``, and the next state."""
    draw = _draw_in_a_graph if torch.compiler.is_compiling() else _draw_from
    drawn, generator = draw(sampler, state["generator"], tensor.shape, dtype)
    return drawn.to(tensor.device), {"generator": generator, "step": state["step"] + 1}


def _draw_from(sampler: str, saved: Tensor, size: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = Generator()
    generator.set_state(saved if saved.is_cpu else saved.cpu())  # a checkpoint is loaded to the device of the parameter
    sample = torch.randn if sampler == "normal" else torch.rand
    return sample(size, generator=generator, dtype=dtype), generator.get_state()


# A graph has no generators, but it can call an operator that has. Torch 2.6 cannot infer the schema from Sequence.
_SCHEMA = "(str sampler, Tensor saved, SymInt[] size, ScalarType dtype) -> (Tensor, Tensor)"
_draw_in_a_graph = torch.library.custom_op("gradchain::draw", _draw_from, mutates_args=(), schema=_SCHEMA)


@_draw_in_a_graph.register_fake
def _(sampler: str, saved: Tensor, size: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty(size, dtype=dtype), torch.empty_like(saved, device="cpu")


@transform(init=_seeded("add_noise"), acts_on="element")
def add_noise(
    tensor: Tensor,
    group: Group,
    state: State,
    eta: Annotated[float, Ge(0)],
    gamma: Annotated[float, Ge(0)] = 0.55,
    *,
    seed: int = 0,
) -> tuple[Tensor, State]:
    r"""Add normal noise, the less the later the step.

    .. math:: g_t + \epsilon_t, \quad \epsilon_t \sim \mathcal{N}(0, \; \eta / (1 + t)^\gamma), \quad t = 0, 1, \ldots

    Acts on each element. The state holds the generator and the number of the step. The noise is the same on every
    replica and every device; it differs between parameters. Two in one chain need two seeds.

    Args:
        eta: The variance of the noise in the first step, in squared units of the tensor; at least 0.
        gamma: How fast the variance shrinks; at least 0, for which it stays.
        seed: What the noise depends on.

    Raises:
        ValueError: ``eta`` or ``gamma`` is below 0.

    Example:
        >>> noisy, x = add_noise(0.01), torch.zeros(10_000)
        >>> state = noisy.init(x, {})
        >>> first, state = noisy.update(x, {}, state)
        >>> second, state = noisy.update(x, {}, state)
        >>> print(f"{first.std():.2f}, {second.std():.3f}")
        0.10, 0.082

    References:
        Neelakantan et al., Adding Gradient Noise Improves Learning for Very Deep Networks,
        https://arxiv.org/abs/1511.06807, 2015; optax ``add_noise``.
    """
    noise, new_state = _draw("normal", tensor, state, tensor.dtype)
    step = state["step"].to(tensor.device, tensor.real.dtype)
    return tensor + (eta / (1 + step) ** gamma) ** 0.5 * noise, new_state


@transform(init=_seeded("dropout"), acts_on="element")
def dropout(
    tensor: Tensor, group: Group, state: State, p: Annotated[float, Ge(0), Lt(1)], *, seed: int = 0
) -> tuple[Tensor, State]:
    r"""Zero elements at random, and scale up the rest so that the mean stays.

    .. math:: t_i \, b_i / (1 - p), \quad b_i = 0 \text{ with probability } p, \text{ else } 1

    Acts on each element. The state holds the generator and the number of the step. The choice is the same on every
    replica and every device; it differs between parameters. Two in one chain need two seeds. NaN and infinite elements
    are not hidden: they become NaN where they are dropped.

    Args:
        p: The probability that an element becomes zero; at least 0 and below 1.
        seed: What the choice depends on.

    Raises:
        ValueError: ``p`` is not in [0, 1).

    Example:
        >>> drop, x = dropout(0.75), torch.ones(10_000)
        >>> dropped, state = drop.update(x, {}, drop.init(x, {}))
        >>> dropped.unique()
        tensor([0., 4.])
        >>> print(f"{dropped.mean():.1f}")
        1.0

    References:
        Tseng et al., Regularizing Meta-Learning via Gradient Dropout, https://arxiv.org/abs/2004.05859, 2020; torch
        ``nn.functional.dropout``.
    """
    drawn, new_state = _draw("uniform", tensor, state, torch.float32)
    return tensor * (drawn >= p) / (1 - p), new_state
