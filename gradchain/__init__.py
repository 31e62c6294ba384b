"""Pure, composable transforms of gradients, updates and parameters around any ``torch.optim`` step."""

import torch as torch  # for reprs, which name it

from gradchain.adapters.attach import Attached, attach
from gradchain.adapters.functional import apply, init_state
from gradchain.adapters.in_backward import InBackward, step_in_backward
from gradchain.adapters.optimizer import ParamTransformingOptimizer
from gradchain.adapters.scheduler import schedule
from gradchain.broadcast import broadcast, to_batch
from gradchain.chain import chain
from gradchain.config import from_config, to_config
from gradchain.contract import FROM_GROUP, Group, State, Transform
from gradchain.explain import Explanation, explain
from gradchain.masked import freeze, masked, partition
from gradchain.transform import transform
from gradchain.transforms.average import lookahead, param_ema
from gradchain.transforms.clip import clip_adaptive, clip_by_norm, clip_by_rms
from gradchain.transforms.elementwise import add, clamp, scale, set_to_zero, sign, zero_nonfinite
from gradchain.transforms.filter import accumulate, amplify_slow, ema, extrapolate, trace, with_error_feedback
from gradchain.transforms.geometry import reject_from_param
from gradchain.transforms.global_norm import clip_by_global_norm, normalize_by_global_norm
from gradchain.transforms.history import clip_by_history, clip_by_zscore
from gradchain.transforms.lmo import frank_wolfe, lmo_l1, lmo_l2, lmo_linf
from gradchain.transforms.monitor import monitor
from gradchain.transforms.noise import add_noise, dropout
from gradchain.transforms.normalize import centralize, normalize, standardize
from gradchain.transforms.project import (
    project_ball_around_reference,
    project_box,
    project_halfspace,
    project_hyperplane,
    project_l1_ball,
    project_l1_sphere,
    project_l2_ball,
    project_l2_sphere,
    project_linf_ball,
    project_nonnegative,
    project_simplex,
)
from gradchain.transforms.skip import skip_large, skip_nonfinite
from gradchain.transforms.sparsify import keep_top_q
from gradchain.transforms.update import (
    cautious,
    decay_to_init,
    decay_weights,
    scale_by_param_norm,
    scale_by_param_rms,
    trust_ratio,
)

__version__ = "0.1.0"

__all__ = [
    "FROM_GROUP",
    "Attached",
    "Explanation",
    "Group",
    "InBackward",
    "ParamTransformingOptimizer",
    "State",
    "Transform",
    "accumulate",
    "add",
    "add_noise",
    "amplify_slow",
    "apply",
    "attach",
    "broadcast",
    "cautious",
    "centralize",
    "chain",
    "clamp",
    "clip_adaptive",
    "clip_by_global_norm",
    "clip_by_history",
    "clip_by_norm",
    "clip_by_rms",
    "clip_by_zscore",
    "decay_to_init",
    "decay_weights",
    "dropout",
    "ema",
    "explain",
    "extrapolate",
    "frank_wolfe",
    "freeze",
    "from_config",
    "init_state",
    "keep_top_q",
    "lmo_l1",
    "lmo_l2",
    "lmo_linf",
    "lookahead",
    "masked",
    "monitor",
    "normalize",
    "normalize_by_global_norm",
    "param_ema",
    "partition",
    "project_ball_around_reference",
    "project_box",
    "project_halfspace",
    "project_hyperplane",
    "project_l1_ball",
    "project_l1_sphere",
    "project_l2_ball",
    "project_l2_sphere",
    "project_linf_ball",
    "project_nonnegative",
    "project_simplex",
    "reject_from_param",
    "scale",
    "scale_by_param_norm",
    "scale_by_param_rms",
    "schedule",
    "set_to_zero",
    "sign",
    "skip_large",
    "skip_nonfinite",
    "standardize",
    "step_in_backward",
    "to_batch",
    "to_config",
    "trace",
    "transform",
    "trust_ratio",
    "with_error_feedback",
    "zero_nonfinite",
]
