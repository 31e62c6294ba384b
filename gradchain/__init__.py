"""Pure, composable transforms of gradients, updates and parameters around any ``torch.optim`` step."""

from gradchain.adapters.optimizer import ParamTransformingOptimizer
from gradchain.broadcast import broadcast, to_batch
from gradchain.chain import chain
from gradchain.transform import Group, Transform, transform
from gradchain.transforms.clip import clip_adaptive, clip_by_norm, clip_by_rms
from gradchain.transforms.elementwise import add, clamp, scale, sign, zero_nonfinite
from gradchain.transforms.geometry import reject_from_param
from gradchain.transforms.lmo import lmo_l1, lmo_l2, lmo_linf
from gradchain.transforms.normalize import centralize, normalize, standardize
from gradchain.transforms.project import (
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
from gradchain.transforms.sparsify import keep_top_q

__all__ = [
    "Group",
    "ParamTransformingOptimizer",
    "Transform",
    "add",
    "broadcast",
    "centralize",
    "chain",
    "clamp",
    "clip_adaptive",
    "clip_by_norm",
    "clip_by_rms",
    "keep_top_q",
    "lmo_l1",
    "lmo_l2",
    "lmo_linf",
    "normalize",
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
    "sign",
    "standardize",
    "to_batch",
    "transform",
    "zero_nonfinite",
]
