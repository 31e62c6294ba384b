"""The rows of the table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.sides import MakeSide, Ours, adam, as_one, sgd
from benchmarks.workloads import (
    ALL,
    GPT2,
    LARGE_BATCH,
    MANY,
    MODELS,
    RESNET,
    SMALL_BATCH,
    SOME,
    Workload,
    alike,
    one_of_megabytes,
)
from gradchain import (
    Group,
    State,
    add,
    chain,
    clamp,
    clip_by_global_norm,
    clip_by_norm,
    monitor,
    normalize,
    project_box,
    project_l2_ball,
    project_nonnegative,
    scale,
    sign,
    transform,
)

RADIUS = 1e-4  # less than a step, which is of length lr, so that projections act


@dataclass(frozen=True)
class Case:
    """Two sides to time."""

    name: str
    workload: Workload
    ours: MakeSide
    against: str
    theirs: MakeSide
    at_most: float | None = None  # the ratio of the times
    their_workload: Workload | None = None  # if not the same
    same_numbers: bool = True


@dataclass(frozen=True)
class MemoryCase:
    """Chains whose memory to measure."""

    name: str
    ours: Ours
    at_most: float = 0.02  # share of the bytes of the parameters


def timed(device: str) -> Iterator[Case]:
    """All cases in which times are compared."""
    for workload in ALL:
        yield Case("no chain", workload, Ours(), "bare step", peers.bare(), 1.03)
    yield from _elementwise(device)
    yield from _norms()
    yield from _several()
    yield from _own_functions()
    yield from _monitored()
    yield from _rai_toolbox()
    yield from _growth([alike(count, 16, 16) for count in (500, 1000, 2000, 4000)], {"4000 of 16x16": 2.1})
    yield from _growth([one_of_megabytes(size) for size in (1, 4, 16, 64)], {})
    yield from _optax()  # last, as its threads stay


def _elementwise(device: str) -> Iterator[Case]:
    edits = (
        (sign(), torch._foreach_sign_),
        (scale(0.9), peers.scale(0.9, device)),
        (clamp(-1.0, 1.0), peers.clamp(1.0)),
    )
    for stage, edit in edits:
        for workload in MODELS:
            yield Case(repr(stage), workload, Ours(stage), "by hand", peers.by_hand(edit), 1.05)
    for workload in MODELS:
        name = "clip_grad_value_ + step"
        yield Case(repr(clamp(-1.0, 1.0)), workload, Ours(clamp(-1.0, 1.0)), name, peers.clip_grad_value(), 1.05)

    five = chain(scale(0.5), add(0.01), clamp(-0.4, 0.4), project_nonnegative(), scale(2.0).named("back"))
    one_by_one = (
        peers.scale(0.5, device),
        lambda grads: torch._foreach_add_(grads, 0.01),
        lambda grads: torch._foreach_clamp_min_(grads, -0.4),  # which has no form with two bounds
        lambda grads: torch._foreach_clamp_max_(grads, 0.4),
        lambda grads: torch._foreach_clamp_min_(grads, 0.0),
        peers.scale(2.0, device),
    )
    by_hand = "by hand, one by one"
    transform_only = peers.by_hand(*one_by_one, inner=None)
    yield Case("five stages, no step", RESNET, Ours(five, steps=False), by_hand, transform_only, 0.6)
    yield Case("five stages", RESNET, Ours(five), by_hand, peers.by_hand(*one_by_one))


def _norms() -> Iterator[Case]:
    for workload in MODELS:
        yield Case("normalize()", workload, Ours(normalize()), "by hand", peers.by_hand(peers.normalize), 1.08)
    for workload in MODELS:
        theirs = peers.by_hand(peers.clip_to_unit_norm)
        yield Case("clip_by_norm(1)", workload, Ours(clip_by_norm(1.0)), "by hand", theirs, 1.08)
    for workload in MODELS:
        ours = Ours(normalize(), param_ndim=1)
        yield Case("normalize(), rows", workload, ours, "by hand", peers.by_hand(peers.normalize_rows), 1.05)
    for workload in (SMALL_BATCH, LARGE_BATCH):
        ours = Ours(normalize(), project_l2_ball(RADIUS), param_ndim=-1)
        yield Case("PGD: normalize(), project_l2_ball(r)", workload, ours, "by hand", peers.pgd(RADIUS), 1.05)
    for workload in MODELS:
        ours = Ours(clip_by_global_norm(1.0), inner=adam)
        yield Case(
            "clip_by_global_norm(1), Adam", workload, ours, "clip_grad_norm_ + step", peers.clip_grad_norm(), 1.02
        )


def _monitored() -> Iterator[Case]:
    for name, inner in (("SGD", sgd), ("Adam", adam)):
        yield Case(f"monitor(), {name}", GPT2, Ours(monitor(), inner=inner), "without", Ours(inner=inner))
        ours, theirs = Ours(monitor(every=50), inner=inner, times=50), Ours(inner=inner, times=50)
        yield Case(f"50 steps of monitor(every=50), {name}", GPT2, ours, "without", theirs, 1.05)


def _several() -> Iterator[Case]:
    for workload in (SOME, GPT2):
        theirs = peers.clip_grad_norm_of_two
        name = "Muon and AdamW as one, global norm"
        # Muon computes in bfloat16, which makes small differences of a norm large.
        yield Case(name, workload, as_one, "clip_grad_norm_, both", theirs, 1.03, same_numbers=False)


def soft_sign(tensor: Tensor, group: Group) -> Tensor:
    """A function of one's own, as in a notebook."""
    return tensor / (tensor.abs() + 1)


def clip(tensor: Tensor, group: Group) -> Tensor:
    """A function of one's own that acts on a unit."""
    excess: Tensor = tensor.norm() / 1.0
    return tensor / excess.clamp_min(1)


def _no_average(tensor: Tensor, group: Group, **arguments: object) -> State:
    return {"average": torch.zeros_like(tensor)}


@transform(init=_no_average)
def sign_momentum(tensor: Tensor, group: Group, state: State, decay: float) -> tuple[Tensor, State]:
    """A stateful function of one's own."""
    average = torch.lerp(state["average"], tensor, 1 - decay)
    return average.sign(), {"average": average}


def _own_functions() -> Iterator[Case]:
    for workload in ALL:
        yield Case("own soft sign", workload, Ours(soft_sign), "by hand", peers.by_hand(peers.soft_sign), 1.15)
    for workload in ALL:
        yield Case("own clip", workload, Ours(clip), "by hand", peers.by_hand(peers.clip_to_unit_norm), 1.15)
    for workload in ALL:
        at_most = 1.1 if workload in MODELS else 1.15
        theirs = peers.by_hand(peers.clip_rows_to_unit_norm)
        yield Case("own clip, rows", workload, Ours(clip, param_ndim=1), "by hand", theirs, at_most)
    for workload in MODELS:
        theirs = peers.by_hand_with_state(peers.sign_momentum(0.9))
        yield Case("own sign momentum", workload, Ours(sign_momentum(0.9)), "by hand", theirs, 1.2)
    many = Ours(clip, param_ndim=-1)
    yield Case("own clip, rows of 2000", MANY, many, "by hand", peers.by_hand(peers.clip_rows_to_unit_norm), 0.5)


def _rai_toolbox() -> Iterator[Case]:
    for workload, at_most in ((MANY, 0.2), (RESNET, 0.75)):
        ours = Ours(normalize(), param_ndim=-1)
        yield Case("normalize(), by param_ndim=-1", workload, ours, "rai-toolbox", peers.rai_normalize, at_most)


def _optax() -> Iterator[Case]:
    for workload in ALL:
        yield Case(repr(clamp(-1.0, 1.0)), workload, Ours(clamp(-1.0, 1.0)), "optax, jitted", peers.optax_clip, 1.0)
    for workload in ALL:
        ours = Ours(clip_by_global_norm(1.0), inner=adam)
        theirs = peers.optax_clip_by_global_norm
        yield Case("clip_by_global_norm(1), Adam", workload, ours, "optax, jitted", theirs, 1.0)


def _growth(workloads: Sequence[Workload], at_most: dict[str, float]) -> Iterator[Case]:
    ours = Ours(chain(clip_by_norm(1.0), scale(0.9)))
    name = "growth: clip_by_norm(1), scale(0.9)"
    for workload in workloads:
        yield Case(name, workload, ours, "bare step", peers.bare(), same_numbers=False)
    for smaller, larger in itertools.pairwise(workloads):
        limit = at_most.get(larger.name)
        yield Case(name, larger, ours, f"the same, {smaller.name}", ours, limit, smaller, same_numbers=False)


MEMORY = (
    MemoryCase("memory: sign()", Ours(sign())),
    MemoryCase("memory: clip_by_norm(1), scale(0.9)", Ours(chain(clip_by_norm(1.0), scale(0.9)))),
    MemoryCase("memory: clip_by_global_norm(1), Adam", Ours(clip_by_global_norm(1.0), inner=adam)),
    MemoryCase("memory: normalize(), project_l2_ball", Ours(normalize(), project_l2_ball(RADIUS), param_ndim=-1)),
    MemoryCase("memory: monitor()", Ours(monitor())),
    MemoryCase("memory: clamp, project_box", Ours(clamp(-1.0, 1.0), project_box(-1.0, 1.0))),
)
