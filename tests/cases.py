"""The catalogue as a table: each row, a transform in one of the forms that matter, feeds every generic test."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import pytest
from torch import Tensor, tensor
from torch.linalg import vector_norm

import gradchain as gc
from gradchain.contract import Group
from gradchain.stage import Stage
from gradchain.testing import SHAPES


@dataclass(frozen=True)
class Case:
    """A transform and, where it is a projection, whether a tensor is in the set that it projects onto."""

    transform: Stage
    contains: Callable[[Tensor], bool] | None = None
    skip: frozenset[str] = frozenset()
    shapes: tuple[tuple[int, ...], ...] = SHAPES

    def __call__(self, tensor: Tensor, group: Group) -> Tensor:
        """What the transform makes of ``tensor``, in its first step if it has a state."""
        return self.transform.update(tensor, group, self.transform.init(tensor, group))[0]


# sgn makes 0 of NaN, as in torch; zero_nonfinite does so on purpose.
HIDES_NAN = frozenset({"propagates_nan"})
# Each call draws another share, so that two results are not to be compared.
DRAWS = frozenset({"deterministic", "any_layout", "half_precision", "broadcasts", "vmaps", "compiles", "copies"})
# Each tensor draws from one stream, seeded once, on the CPU: not each sub-tensor from its own, and not within graphs.
SEEDED = frozenset({"broadcasts", "vmaps", "compiles"})
# What all tensors have in common is measured of the whole tensor; a loop measures each sub-tensor.
SEES_ALL = frozenset({"broadcasts"})
# Hyperparameters of shape (3,) fit tensors of shape (..., 3), and not their elements.
FITS_3 = frozenset({"broadcasts"})
SHAPES_3 = ((3,), (0, 3), (2, 3), (2, 2, 3))

A = tensor([1.0, -2.0, 0.5])
LOWER, UPPER = tensor([-0.5, 0.0, -inf]), tensor([0.25, 0.0, 1.5])


def at_most(value: Tensor | float, bound: Tensor | float) -> bool:
    """``value <= bound``, up to rounding."""
    return bool((tensor(0.0) + value <= bound + 1e-9).all())


def is_close(value: Tensor, target: float) -> bool:
    return at_most((value - target).abs(), 0)


CASES = [
    Case(gc.sign(), skip=HIDES_NAN),
    Case(gc.scale(-0.5)),
    Case(gc.add(0.3)),
    Case(gc.clamp(-0.5, 1.0)),
    Case(gc.clamp(min=0.25)),
    Case(gc.clamp(max=0.5).named("grad")),
    Case(gc.set_to_zero(), skip=HIDES_NAN),
    Case(gc.zero_nonfinite(), skip=HIDES_NAN),
    Case(gc.normalize()),
    Case(gc.normalize(1)),
    Case(gc.normalize(inf)),
    Case(gc.centralize()),
    Case(gc.standardize()),
    Case(gc.clip_by_norm(1.5)),
    Case(gc.clip_by_norm(0.5, ord=inf)),
    Case(gc.clip_by_rms(0.5)),
    Case(gc.clip_adaptive(0.1)),
    Case(gc.clip_by_global_norm(1.5), skip=SEES_ALL),
    Case(gc.clip_by_global_norm(0.5, ord=inf), skip=SEES_ALL),
    Case(gc.normalize_by_global_norm(), skip=SEES_ALL),
    Case(gc.skip_nonfinite(), skip=HIDES_NAN),
    Case(gc.skip_large(1.5), skip=HIDES_NAN),
    Case(gc.clip_by_history(50.0)),
    Case(gc.clip_by_zscore(2.5)),
    Case(gc.cautious()),
    Case(gc.trust_ratio()),
    Case(gc.trust_ratio(0.1, 10.0, lr_included=False)),
    Case(gc.scale_by_param_norm()),
    Case(gc.scale_by_param_rms()),
    Case(gc.decay_weights(0.1)),
    Case(gc.decay_weights(0.1, ord=1, cautious=True)),
    Case(gc.decay_to_init(0.1)),
    Case(gc.project_ball_around_reference(0.5, lower=-1.0, upper=1.0)),
    Case(gc.project_ball_around_reference(0.5, ord=1)),
    Case(gc.project_ball_around_reference(0.5, reference=tensor(0.5))),
    Case(gc.project_ball_around_reference(0.5, ord=inf, upper=1.0)),
    Case(gc.keep_top_q(0.25)),
    Case(gc.keep_top_q(0.5, dq=0.4), skip=DRAWS),
    Case(gc.lmo_l1(), skip=HIDES_NAN),
    Case(gc.lmo_l2()),
    Case(gc.lmo_linf(), skip=HIDES_NAN),
    Case(gc.frank_wolfe()),
    Case(gc.reject_from_param()),
    Case(gc.monitor()),
    Case(gc.ema(0.9)),
    Case(gc.ema(0.75, debias=False)),
    Case(gc.trace(0.9)),
    Case(gc.trace(0.9, nesterov=True)),
    Case(gc.amplify_slow(2.0, 0.98)),
    Case(gc.extrapolate()),
    Case(gc.extrapolate(0.475)),
    Case(gc.accumulate(1)),
    Case(gc.accumulate(3), skip=HIDES_NAN),
    Case(gc.add_noise(0.1), skip=SEEDED),
    Case(gc.dropout(0.5, seed=1), skip=SEEDED),
    Case(gc.param_ema(0.9)),
    Case(gc.param_ema(0.75, debias=False)),
    Case(gc.lookahead(1, 0.5)),
    Case(gc.lookahead(5, 0.5)),
    Case(gc.project_nonnegative(), lambda x: at_most(-x, 0)),
    Case(gc.project_box(-0.5, 1.0), lambda x: at_most(-x, 0.5) and at_most(x, 1)),
    Case(gc.project_box(LOWER, UPPER), lambda x: at_most(LOWER, x) and at_most(x, UPPER), FITS_3, SHAPES_3),
    Case(gc.project_linf_ball(0.5), lambda x: at_most(x.abs(), 0.5)),
    Case(gc.project_l2_ball(1.5), lambda x: at_most(vector_norm(x), 1.5)),
    Case(gc.project_l2_ball(0.0), lambda x: at_most(vector_norm(x), 0)),
    Case(gc.project_l2_sphere(1.5), lambda x: is_close(vector_norm(x), 1.5)),
    Case(gc.project_l1_ball(1.5), lambda x: at_most(vector_norm(x, 1), 1.5)),
    Case(gc.project_l1_sphere(1.5), lambda x: is_close(vector_norm(x, 1), 1.5)),
    Case(gc.project_simplex(), lambda x: at_most(-x, 0) and is_close(x.sum(), 1)),
    Case(gc.project_simplex(2.5), lambda x: at_most(-x, 0) and is_close(x.sum(), 2.5)),
    Case(gc.project_hyperplane(-2.0, 0.5), lambda x: is_close(-2 * x.sum(), 0.5)),
    Case(gc.project_hyperplane(A, 0.5), lambda x: is_close((A * x).sum(), 0.5), FITS_3, SHAPES_3),
    Case(gc.project_halfspace(-2.0, 0.5), lambda x: at_most(-2 * x.sum(), 0.5)),
    Case(gc.project_halfspace(A, 0.5), lambda x: at_most((A * x).sum(), 0.5), FITS_3, SHAPES_3),
    Case(gc.with_error_feedback(gc.keep_top_q(0.25))),
    Case(gc.masked(gc.normalize(), tensor(True))),
]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    """One test for each of ``cases``, named by its transform."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: repr(case.transform))
