"""What the pages of transforms say beyond the docstrings: slots, a picture, names elsewhere. One row a transform."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """A transform, as its page shows it.

    Attributes:
        family: The heading in the navigation under which it stands.
        slots: The slots that it is for, the usual one first.
        kind: The kind of its picture, a function of ``pictures.py``; "" for none.
        shown: What the picture shows, one panel each: expressions that the kind evaluates.
        elsewhere: Its names in other libraries than optax, whose names are in ``docs/coming-from/optax.md``.
        acts_on: A key of ``pages.ACTS_ON``, where there is no definition by ``@transform`` that says so.
        has_state: Whether it has a state, where there is no such definition.
    """

    family: str
    slots: tuple[str, ...]
    kind: str
    shown: tuple[str, ...]
    elsewhere: dict[str, str] = field(default_factory=dict)
    acts_on: str = "theirs"
    has_state: bool = False


CAPTIONS = {
    "field": "Vectors of two elements. An arrow leads from a vector to what becomes of it; the net is what becomes of "
    "a grid of straight lines.",
    "elements": "400 elements from a normal distribution. Left, each element before and after; right, how many there "
    "are of each size, before (grey) and after.",
    "series": "One element over 100 steps: what goes in (grey) and what comes out.",
    "norms": "The norm of the gradients over 60 steps: what goes in (grey) and what comes out.",
    "matrix": "A matrix of 6 rows, before and after: blue is negative, orange positive.",
    "spectrum": "The singular values of a matrix of 16 rows, before (grey) and after.",
    "path": "40 steps towards the minimum of a quadratic function, from the dot: of the inner optimizer alone (grey), "
    "and with the transform.",
}
"""What the pictures of each kind show."""

PRE, UPDATE, POST = ("pre",), ("update",), ("post",)
GRADIENT = ("pre", "update")
ANY = ("pre", "update", "post")

FAMILIES = (
    "Clip and normalize",
    "Project onto a set",
    "Look back over the steps",
    "Change each element",
    "Change the update",
    "Watch and skip steps",
    "Compose and select",
)
CLIP, PROJECT, STEPS, ELEMENT, CHANGE, SKIP, COMPOSE = FAMILIES

CATALOGUE = {
    "accumulate": Row(
        STEPS, PRE, "series", ("accumulate(10)",), {"Keras": "`gradient_accumulation_steps` of an optimizer"}
    ),
    "add": Row(ELEMENT, ANY, "elements", ("add(1.0)",)),
    "add_noise": Row(ELEMENT, PRE, "elements", ("add_noise(0.05)",)),
    "amplify_slow": Row(STEPS, PRE, "series", ("amplify_slow(2.0, 0.9)",)),
    "broadcast": Row(
        COMPOSE,
        ANY,
        "matrix",
        ("broadcast(normalize(), None)(x, {})", "broadcast(normalize(), 1)(x, {})", "broadcast(normalize(), 0)(x, {})"),
    ),
    "cautious": Row(CHANGE, UPDATE, "path", ("update=cautious(), lr=0.05, momentum=0.9",)),
    "centralize": Row(CLIP, PRE, "spectrum", ("centralize()",)),
    "chain": Row(
        COMPOSE, ANY, "field", ("clip_by_norm(1.5)", "clamp(-1.0, 1.0)", "chain(clip_by_norm(1.5), clamp(-1.0, 1.0))")
    ),
    "clamp": Row(
        ELEMENT,
        ANY,
        "elements",
        ("clamp(-1.0, 1.0)",),
        {
            "Keras": "`clipvalue` of an optimizer",
            "torch": "`torch.clamp`, `torch.nn.utils.clip_grad_value_`",
            "rai-toolbox": "`ClampedGradientOptimizer`, `ClampedParameterOptimizer`",
        },
    ),
    "clip_adaptive": Row(CLIP, PRE, "field", ("clip_adaptive(1.0)",)),
    "clip_by_global_norm": Row(
        CLIP,
        GRADIENT,
        "norms",
        ("clip_by_global_norm(2.0)",),
        {"Keras": "`global_clipnorm` of an optimizer", "torch": "`torch.nn.utils.clip_grad_norm_`"},
    ),
    "clip_by_history": Row(CLIP, PRE, "norms", ("clip_by_history(60.0)",)),
    "clip_by_norm": Row(
        CLIP,
        GRADIENT,
        "field",
        ("clip_by_norm(1.0)", "clip_by_norm(1.0, ord=1)", "clip_by_norm(1.0, ord=inf)"),
        {"Keras": "`clipnorm` of an optimizer, with `param_ndim=None`", "torch": "`torch.renorm`, for rows"},
    ),
    "clip_by_rms": Row(CLIP, GRADIENT, "field", ("clip_by_rms(1.0)",)),
    "clip_by_zscore": Row(CLIP, PRE, "norms", ("clip_by_zscore(2.5, warmup=5)",)),
    "decay_to_init": Row(CHANGE, UPDATE, "path", ("update=decay_to_init(0.1), lr=0.1",)),
    "decay_weights": Row(
        CHANGE,
        UPDATE,
        "path",
        ("update=decay_weights(0.05), lr=0.1", "update=decay_weights(0.02, ord=1), lr=0.1"),
        {"Keras": "`weight_decay` of an optimizer", "torch": "`weight_decay` of `torch.optim.AdamW`, times `lr`"},
    ),
    "dropout": Row(ELEMENT, PRE, "elements", ("dropout(0.3)",), {"torch": "`torch.nn.functional.dropout`"}),
    "ema": Row(STEPS, PRE, "series", ("ema(0.9)", "ema(0.9, debias=False)")),
    "extrapolate": Row(STEPS, GRADIENT, "series", ("extrapolate(1.0)",)),
    "frank_wolfe": Row(
        CHANGE,
        POST,
        "path",
        ("pre=lmo_l2(), post=frank_wolfe(), lr=0.15", "pre=lmo_l1(), post=frank_wolfe(), lr=0.15"),
        {"rai-toolbox": "`L1FrankWolfe`, `L2FrankWolfe`, `LinfFrankWolfe`, with an `lmo` in `pre`"},
    ),
    "freeze": Row(
        COMPOSE,
        UPDATE,
        "path",
        ("update=freeze(tensor([False, True])), lr=0.1",),
        {"Keras": "`layer.trainable = False`", "torch": "`requires_grad_(False)`"},
        acts_on="element",
    ),
    "keep_top_q": Row(
        ELEMENT, PRE, "elements", ("keep_top_q(0.7)",), {"rai-toolbox": "`TopQGradientOptimizer`; q is what is zeroed"}
    ),
    "lmo_l1": Row(CHANGE, PRE, "field", ("lmo_l1()",), {"rai-toolbox": "`L1FrankWolfe`, with `frank_wolfe`"}),
    "lmo_l2": Row(CHANGE, PRE, "field", ("lmo_l2()",), {"rai-toolbox": "`L2FrankWolfe`, with `frank_wolfe`"}),
    "lmo_linf": Row(CHANGE, PRE, "field", ("lmo_linf()",), {"rai-toolbox": "`LinfFrankWolfe`, with `frank_wolfe`"}),
    "lookahead": Row(STEPS, POST, "path", ("post=lookahead(5, 0.5), lr=0.28",)),
    "masked": Row(
        COMPOSE,
        ANY,
        "matrix",
        ("masked(scale(0.1), x > 0)(x, {})", 'masked(sign(), "*.weight")(x, {"name": "fc.weight"})'),
    ),
    "monitor": Row(SKIP, ANY, "norms", ("monitor()",), acts_on="tensor", has_state=True),
    "normalize": Row(
        CLIP,
        GRADIENT,
        "field",
        ("normalize()", "normalize(1)", "normalize(inf)"),
        {
            "torch": "`torch.nn.functional.normalize`, along a dimension",
            "rai-toolbox": "`L1NormedGradientOptim`, `L2NormedGradientOptim`",
        },
    ),
    "normalize_by_global_norm": Row(CLIP, GRADIENT, "norms", ("normalize_by_global_norm()",)),
    "param_ema": Row(
        STEPS,
        POST,
        "path",
        ("post=param_ema(0.8), lr=0.28",),
        {"Keras": "`use_ema` of an optimizer", "torch": "`torch.optim.swa_utils.AveragedModel`"},
    ),
    "partition": Row(
        COMPOSE,
        ANY,
        "matrix",
        (
            'partition({"*.bias": sign(), "*": scale(0.3)})(x, {"name": "a.bias"})',
            'partition({"*.bias": sign(), "*": scale(0.3)})(x, {"name": "a.weight"})',
        ),
    ),
    "project_ball_around_reference": Row(
        PROJECT, POST, "field", ("project_ball_around_reference(1.0, reference=tensor([0.5, 0.5]), upper=1.0)",)
    ),
    "project_box": Row(PROJECT, POST, "field", ("project_box(-1.0, tensor([0.5, 1.5]))",)),
    "project_halfspace": Row(PROJECT, POST, "field", ("project_halfspace(tensor([1.0, 2.0]), 1.0)",)),
    "project_hyperplane": Row(PROJECT, POST, "field", ("project_hyperplane(tensor([1.0, 2.0]), 1.0)",)),
    "project_l1_ball": Row(PROJECT, POST, "field", ("project_l1_ball(1.2)",)),
    "project_l1_sphere": Row(PROJECT, POST, "field", ("project_l1_sphere(1.2)",)),
    "project_l2_ball": Row(
        PROJECT,
        POST,
        "field",
        ("project_l2_ball(1.2)",),
        {
            "Keras": "`constraints.MaxNorm`, with `param_ndim=-1`",
            "torch": "`torch.renorm`, for rows",
            "rai-toolbox": "`L2ProjectedOptim`, with `normalize` in `pre`",
        },
    ),
    "project_l2_sphere": Row(
        PROJECT, POST, "field", ("project_l2_sphere(1.2)",), {"Keras": "`constraints.UnitNorm`, with radius 1"}
    ),
    "project_linf_ball": Row(
        PROJECT,
        POST,
        "field",
        ("project_linf_ball(1.2)",),
        {"rai-toolbox": "`LinfProjectedOptim`, with `sign` in `pre`"},
    ),
    "project_nonnegative": Row(
        PROJECT, POST, "field", ("project_nonnegative()",), {"Keras": "`constraints.NonNeg`", "torch": "`torch.relu`"}
    ),
    "project_simplex": Row(PROJECT, POST, "field", ("project_simplex()",)),
    "reject_from_param": Row(CHANGE, GRADIENT, "field", ("reject_from_param()",)),
    "scale": Row(ELEMENT, ANY, "elements", ("scale(-0.5)",)),
    "scale_by_param_norm": Row(CHANGE, GRADIENT, "field", ("scale_by_param_norm()",)),
    "scale_by_param_rms": Row(CHANGE, GRADIENT, "field", ("scale_by_param_rms()",)),
    "set_to_zero": Row(CHANGE, UPDATE, "elements", ("set_to_zero()",)),
    "sign": Row(
        ELEMENT, PRE, "elements", ("sign()",), {"torch": "`torch.sgn`", "rai-toolbox": "`SignedGradientOptim`"}
    ),
    "skip_large": Row(SKIP, PRE, "norms", ("skip_large(4.0)",)),
    "skip_nonfinite": Row(SKIP, PRE, "norms", ("skip_nonfinite()",), {"torch": "`torch.amp.GradScaler` skips, too"}),
    "standardize": Row(CLIP, PRE, "elements", ("standardize()",)),
    "trace": Row(STEPS, PRE, "series", ("trace(0.9)",), {"torch": "`momentum` of `torch.optim.SGD`"}),
    "trust_ratio": Row(CHANGE, UPDATE, "field", ("trust_ratio()",)),
    "with_error_feedback": Row(STEPS, PRE, "series", ("with_error_feedback(grid)", "grid"), has_state=True),
    "zero_nonfinite": Row(ELEMENT, PRE, "norms", ("zero_nonfinite()",), {"torch": "`torch.nan_to_num`, with zeros"}),
}
