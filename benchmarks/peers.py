"""What ours is compared with: the same arithmetic in plain torch, in rai-toolbox and in optax.

Nothing here uses gradchain. The plain torch is the fastest of the ways to write it that were tried.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.dlpack import from_dlpack

from benchmarks.sides import LR, MakeOptimizer, MakeSide, Step, TorchSide, adam, grads_of, muon_and_adamw, sgd

Edit = Callable[[list[Tensor]], object]
"""Changes gradients in place."""

TINY = torch.finfo(torch.float32).tiny ** 0.5


class NotInstalledError(Exception):
    """There is nothing to compare with."""


def bare(inner: MakeOptimizer = sgd) -> MakeSide:
    """The inner optimizer by itself."""
    return lambda gradients: TorchSide(gradients, lambda params: inner(params).step)


def by_hand(*edits: Edit, inner: MakeOptimizer | None = sgd) -> MakeSide:
    """Gradients edited in place, then a step of the inner optimizer, if there is one."""

    def make_step(params: list[Tensor]) -> Step:
        step: Step = inner(params).step if inner else lambda: None

        @torch.no_grad()
        def edit_and_step() -> None:
            grads = grads_of(params)
            for edit in edits:
                edit(grads)
            step()

        return edit_and_step

    return lambda gradients: TorchSide(gradients, make_step)


def by_hand_with_state(make_edit: Callable[[], Edit]) -> MakeSide:
    """The same with an edit that remembers something, made anew for each side."""
    return lambda gradients: by_hand(make_edit())(gradients)


def scale(factor: float, device: str) -> Edit:
    """Multiply. By a tensor, which costs less than a number that becomes one for each gradient."""
    factor_ = torch.tensor(factor, device=device)
    return lambda grads: torch._foreach_mul_(grads, factor_)


def clamp(bound: float) -> Edit:
    """Clamp to [-``bound``, ``bound``]: one pass over each tensor, or two calls for all of them if they are small."""

    def edit(grads: list[Tensor]) -> None:
        if _better_together(grads, 2**11):
            torch._foreach_clamp_min_(grads, -bound)
            torch._foreach_clamp_max_(grads, bound)
        else:
            for grad in grads:
                grad.clamp_(-bound, bound)

    return edit


def normalize(grads: list[Tensor]) -> None:
    """Divide each tensor by its norm."""
    _divide_by_norms(grads, TINY)


def clip_to_unit_norm(grads: list[Tensor]) -> None:
    """Divide each tensor by its norm where that is above 1."""
    _divide_by_norms(grads, 1.0)


def _divide_by_norms(grads: list[Tensor], smallest: float) -> None:
    norms = torch._foreach_norm(grads)
    torch._foreach_clamp_min_(norms, smallest)
    torch._foreach_div_(grads, norms)


def normalize_rows(grads: list[Tensor]) -> None:
    """Divide each row, along the last dimension, by its norm."""
    _divide_rows_by_norms(grads, TINY)


def clip_rows_to_unit_norm(grads: list[Tensor]) -> None:
    """Divide each row, along the last dimension, by its norm where that is above 1."""
    _divide_rows_by_norms(grads, 1.0)


def _divide_rows_by_norms(grads: list[Tensor], smallest: float) -> None:
    if _better_together(grads, 2**13):
        norms = [torch.linalg.vector_norm(grad, dim=-1, keepdim=True) for grad in grads]
        torch._foreach_clamp_min_(norms, smallest)
        torch._foreach_div_(grads, norms)
    else:
        for grad in grads:
            grad.div_(torch.linalg.vector_norm(grad, dim=-1, keepdim=True).clamp_min_(smallest))


def soft_sign(grads: list[Tensor]) -> None:
    """Divide each element by its magnitude plus 1."""
    magnitudes = torch._foreach_abs(grads)
    torch._foreach_add_(magnitudes, 1)
    torch._foreach_div_(grads, magnitudes)


def sign_momentum(decay: float) -> Callable[[], Edit]:
    """The sign of an exponential moving average. What it returns makes an edit with averages of its own."""

    def make_edit() -> Edit:
        averages: list[Tensor] = []

        def edit(grads: list[Tensor]) -> None:
            averages.extend(map(torch.zeros_like, grads) if not averages else ())
            torch._foreach_lerp_(averages, grads, 1 - decay)
            torch._foreach_copy_(grads, averages)
            torch._foreach_sign_(grads)

        return edit

    return make_edit


def _better_together(grads: list[Tensor], size: int) -> bool:
    """Whether few calls matter more than few passes over memory: on a GPU, and where the mean is below ``size``."""
    return grads[0].is_cuda or sum(grad.numel() for grad in grads) < size * len(grads)


def pgd(radius: float) -> MakeSide:
    """A projected step: each entry of a batch along its normalized gradient, then back into a ball."""

    def make_step(params: list[Tensor]) -> Step:
        (param,) = params
        optimizer = sgd(params)

        @torch.no_grad()
        def step() -> None:
            (grad,) = grads_of(params)
            grad, point = grad.flatten(1), param.flatten(1)
            grad.mul_(torch.linalg.vector_norm(grad, dim=1, keepdim=True).clamp_min_(TINY).reciprocal_())
            optimizer.step()
            norm = torch.linalg.vector_norm(point, dim=1, keepdim=True)
            point.mul_(norm.div_(radius).clamp_min_(1).reciprocal_())

        return step

    return lambda gradients: TorchSide(gradients, make_step)


def clip_grad_norm(inner: MakeOptimizer = adam) -> MakeSide:
    """``clip_grad_norm_``, as in most training loops."""

    def make_step(params: list[Tensor]) -> Step:
        step = inner(params).step

        def clip_and_step() -> None:
            clip_grad_norm_(params, 1.0)
            step()

        return clip_and_step

    return lambda gradients: TorchSide(gradients, make_step)


def clip_grad_norm_of_two(gradients: list[Tensor]) -> TorchSide:
    """``clip_grad_norm_`` over all, then the steps of Muon and AdamW."""

    def make_step(params: list[Tensor]) -> Step:
        steps = [optimizer.step for optimizer in muon_and_adamw(params)]

        def clip_and_step() -> None:
            clip_grad_norm_(params, 1.0)
            for step in steps:
                step()

        return clip_and_step

    return TorchSide(gradients, make_step)


def clip_grad_value() -> MakeSide:
    """``clip_grad_value_``, as in most training loops."""

    def make_step(params: list[Tensor]) -> Step:
        step = sgd(params).step

        def clip_and_step() -> None:
            clip_grad_value_(params, 1.0)
            step()

        return clip_and_step

    return lambda gradients: TorchSide(gradients, make_step)


def rai_normalize(gradients: list[Tensor]) -> TorchSide:
    """The normalized steps of rai-toolbox, of each entry along the first dimension."""
    optim = _installed("rai_toolbox.optim")
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")
    return TorchSide(gradients, lambda params: optim.L2NormedGradientOptim(params, sgd).step)


def optax_clip(gradients: list[Tensor]) -> OptaxSide:
    """Clamped gradients and SGD in optax."""
    return OptaxSide(gradients, "clip", "sgd")


def optax_clip_by_global_norm(gradients: list[Tensor]) -> OptaxSide:
    """Clipped gradients and Adam in optax."""
    return OptaxSide(gradients, "clip_by_global_norm", "adam")


class OptaxSide:
    """Steps in jax, compiled, that reuse the memory of parameters and state."""

    def __init__(self, gradients: list[Tensor], clip: str, optimizer: str) -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some of the GPU's memory too
        jax = _installed("jax")
        try:
            device = jax.devices(gradients[0].device.type)[0]
        except RuntimeError as error:  # jax is installed for other devices
            raise NotInstalledError from error
        init, self._update, self._copy = _compiled(clip, optimizer)
        self._wait = jax.block_until_ready
        self._first_grads = [jax.device_put(gradient.numpy(force=True), device) for gradient in gradients]
        self._params = [jax.numpy.zeros_like(gradient) for gradient in self._first_grads]
        self._state = init(self._params)
        self.refresh()

    def step(self) -> None:
        """Make a step, and wait for it."""
        self._params, self._state = self._wait(self._update(self._params, self._state, self._grads))

    def refresh(self) -> None:
        """Copy the first gradients."""
        self._grads = self._wait(self._copy(self._first_grads))

    def values(self) -> list[Tensor]:
        """The parameters; a step does not write gradients."""
        return [from_dlpack(param) for param in self._params]


@functools.cache
def _compiled(clip: str, optimizer: str) -> tuple[Any, Any, Any]:
    """Functions that make a state, that make a step, and that copy. Once, as 2000 parameters take half a minute."""
    jax, optax = _installed("jax"), _installed("optax")
    transformation = optax.chain(getattr(optax, clip)(1.0), getattr(optax, optimizer)(LR))

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def copy(arrays: list[Any]) -> list[Any]:
        return [jax.numpy.copy(array) for array in arrays]

    return transformation.init, jax.jit(update, donate_argnums=(0, 1)), jax.jit(copy)


def _installed(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise NotInstalledError from error
