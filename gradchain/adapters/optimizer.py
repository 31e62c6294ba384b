"""``ParamTransformingOptimizer``: chains around the step of any ``torch.optim`` optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from gradchain.broadcast import broadcast, require_param_ndim, sub_ndim, to_batch
from gradchain.chain import Chain, chain
from gradchain.transform import Group, Transform, locate, merge_hyperparameters

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class ParamTransformingOptimizer(Optimizer):
    r"""Transform gradients before, and parameters after, each step of an inner optimizer.

    .. math:: p \leftarrow \mathrm{post}(\mathrm{inner}(p, \; c \cdot \mathrm{pre}(\nabla p) + b))

    A step evaluates the closure, if there is one; applies ``pre`` to each gradient, then ``grad_scale`` (c) and
    ``grad_bias`` (b); calls ``inner_opt.step``; and applies ``post`` to each parameter. With a closure, ``pre`` follows
    every evaluation of it. Gradients and parameters are written in place. A parameter without a gradient is skipped by
    ``pre`` and still gets ``post``. ``group["param"]`` is there in ``pre``, and ``group["grad"]`` in ``post``.

    ``param_groups``, ``state`` and ``defaults`` are those of the inner optimizer, so schedulers and checkpoints work on
    either. The hyperparameters of the chains, ``param_ndim``, ``grad_scale`` and ``grad_bias`` are keys of the groups.

    A subclass can also override ``_pre_step_transform_`` and ``_post_step_transform_``, which run after the chains of
    their slots.

    If something raises within a step, the parameters are as they were before it; gradients and the state of the inner
    optimizer are as far as the step had come, except that a failing ``pre`` also restores the gradients.

    Args:
        params: Parameters, named parameters or param groups, as any optimizer takes them. Not with an instance.
        InnerOpt: An optimizer type, a ``functools.partial`` of one, or an instance.
        pre: The transform of each gradient.
        post: The transform of each parameter.
        param_ndim: What the transforms act on, per group; see ``broadcast``. The default, -1, is each entry along the
            first dimension.
        grad_scale: Factor of each gradient after ``pre``, per group.
        grad_bias: Added to each gradient after the factor, per group.
        defaults: Further keys of the groups, with the values for those that lack them.
        **inner_opt_kwargs: Passed to ``InnerOpt``.

    Raises:
        TypeError: ``InnerOpt`` is no optimizer, or something is of the wrong type.
        ValueError: ``params`` are missing, a value is out of range, ``param_ndim`` does not fit a parameter, or one
            hyperparameter has two defaults.

    Example:
        >>> from gradchain import project_l2_ball, sign
        >>> x = torch.tensor([-10.0, 10.0], requires_grad=True)
        >>> optim = ParamTransformingOptimizer([x], torch.optim.AdamW, pre=sign(), lr=1.0)
        >>> (10_000 * x).sum().backward()
        >>> optim.step()
        >>> x
        tensor([-10.9000,   8.9000], requires_grad=True)

        >>> inner = torch.optim.SGD([x], lr=1.0)
        >>> ParamTransformingOptimizer(InnerOpt=inner, post=project_l2_ball(2.0), param_ndim=None).step()
        >>> x.norm()
        tensor(2., grad_fn=<LinalgVectorNormBackward0>)

    References:
        rai-toolbox ``ParamTransformingOptimizer``, https://mit-ll-responsible-ai.github.io/responsible-ai-toolbox.
    """

    inner_opt: Optimizer
    pre: Chain
    post: Chain
    _own_defaults: dict[str, Any]

    def __init__(
        self,
        params: Params | None = None,
        InnerOpt: Optimizer | Callable[..., Optimizer] = SGD,
        *,
        pre: Transform | None = None,
        post: Transform | None = None,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        chains = {slot: chain() if t is None else chain(t) for slot, t in (("pre", pre), ("post", post))}
        own_defaults = {
            "param_ndim": param_ndim,
            "grad_scale": grad_scale,
            "grad_bias": grad_bias,
            **merge_hyperparameters((f"{s} {place}", t) for s in chains for place, t in chains[s].places()),
            **(defaults or {}),
        }
        inner_opt = _make_inner(params, InnerOpt, inner_opt_kwargs)
        known = sorted(own_defaults.keys() & inner_opt.defaults.keys())
        if known:
            raise ValueError(
                f"defaults has the keys {known} of {type(inner_opt).__name__}; pass them as keyword arguments, "
                f"{', '.join(f'{key}=...' for key in known)}"
            )
        for index, group in enumerate(inner_opt.param_groups):
            _check_group(index, {**own_defaults, **group}, chains)
        inner_opt.defaults.update(own_defaults)
        # Not Optimizer.__init__: it would make groups, state and defaults of its own, apart from the inner optimizer's.
        # Its __setstate__ sets up all else: hooks, and the patched step.
        self.__setstate__({"inner_opt": inner_opt, "_own_defaults": own_defaults, **chains})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups of the inner optimizer."""
        return self.inner_opt.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.inner_opt.param_groups = value

    @property
    def state(self) -> Any:
        """The state of the inner optimizer."""
        return self.inner_opt.state

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.inner_opt.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the inner optimizer, with the keys of this one."""
        return self.inner_opt.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.inner_opt.defaults = value

    @overload
    def step(self, closure: None = None) -> Any: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; see the class.

        Args:
            closure: Evaluates the loss, with gradients, and returns it.

        Returns:
            What the inner optimizer returns: the loss of the closure, or None.
        """
        written_late = (closure is not None and self._acts("pre")) or self._acts("post")
        with _restored_on_error([p for g in self.param_groups for p in g["params"]] if written_late else []):
            if closure is None:
                self._apply_pre_step_transform_()
                loss = self.inner_opt.step()
            else:
                loss = self.inner_opt.step(self._transforming(closure))
            self._apply_post_step_transform_()
        return loss

    def _transforming(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(closure)
        def evaluate() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._apply_pre_step_transform_()
            return loss

        return evaluate

    def _pre_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        """Edit ``param.grad`` (or ``param``) in place before the inner step; for subclasses, does nothing here.

        Args:
            param: A parameter that has a gradient, in batch form (N, d0, ...), as is ``param.grad``: see ``to_batch``.
            optim_group: The param group of the parameter.
        """

    def _post_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        """Edit ``param`` (or ``param.grad``) in place after the inner step; for subclasses, does nothing here.

        Args:
            param: A parameter in batch form (N, d0, ...), as is ``param.grad``, which can be None: see ``to_batch``.
            optim_group: The param group of the parameter.
        """

    @torch.no_grad()
    def _apply_pre_step_transform_(self) -> None:
        """Do all that precedes the inner step: ``pre``, ``_pre_step_transform_``, ``grad_scale`` and ``grad_bias``."""
        if not self._acts("pre"):
            return
        pre = broadcast(self.pre)
        runs_hook = self._overrides("_pre_step_transform_")

        def transform_grad(param: Tensor, group: Group) -> None:
            grad = param.grad
            if grad is None:
                return
            if pre:
                grad.copy_(pre(grad.detach(), {**group, "param": param.detach()}))
            if runs_hook:
                _run_hook(self._pre_step_transform_, param, group)
            if not _is_number(group["grad_scale"], 1.0):
                grad.mul_(group["grad_scale"])
            if not _is_number(group["grad_bias"], 0.0):
                grad.add_(group["grad_bias"])

        self._for_each_param("pre", _make_grad_writable)
        with _restored_on_error([p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]):
            self._for_each_param("pre", transform_grad)

    @torch.no_grad()
    def _apply_post_step_transform_(self) -> None:
        """Do all that comes after the inner step: ``post`` and ``_post_step_transform_``."""
        if not self._acts("post"):
            return
        post = broadcast(self.post)
        runs_hook = self._overrides("_post_step_transform_")

        def transform_param(param: Tensor, group: Group) -> None:
            if post:
                grad = {} if param.grad is None else {"grad": param.grad.detach()}
                param.copy_(post(param.detach(), {**group, **grad}))
            if runs_hook:
                _run_hook(self._post_step_transform_, param, group)

        self._for_each_param("post", transform_param)

    def _acts(self, slot: str) -> bool:
        """Whether there is anything to do in a slot."""
        if getattr(self, slot) or self._overrides(f"_{slot}_step_transform_"):
            return True
        return slot == "pre" and not all(
            _is_number(group["grad_scale"], 1.0) and _is_number(group["grad_bias"], 0.0) for group in self.param_groups
        )

    def _overrides(self, hook: str) -> bool:
        return getattr(type(self), hook) is not getattr(ParamTransformingOptimizer, hook)

    def _for_each_param(self, slot: str, act: Callable[[Tensor, Group], None]) -> None:
        for group_index, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                try:
                    act(param, group)
                except Exception as error:
                    locate(error, f"{slot}, {_describe(group_index, group, index)}")
                    raise

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see ``torch.optim.Optimizer.add_param_group``."""
        self.inner_opt.add_param_group(param_group)
        try:
            _check_group(len(self.param_groups) - 1, self.param_groups[-1], {"pre": self.pre, "post": self.post})
        except Exception:
            del self.param_groups[-1]
            raise

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the inner optimizer, exactly ``state`` and ``param_groups``."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self.inner_opt.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer or of a bare inner one; group keys that it lacks get the defaults."""
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self.inner_opt.load_state_dict(state_dict)
        self._complete_groups()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _complete_groups(self) -> None:
        for group in self.param_groups:
            for key, value in self._own_defaults.items():
                group.setdefault(key, value)

    def __getstate__(self) -> dict[str, Any]:
        # Like torch, without hooks; "step" is in the instance only where a scheduler has patched it.
        return {k: v for k, v in self.__dict__.items() if k != "step" and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._complete_groups()

    def __repr__(self) -> str:
        inner = repr(self.inner_opt).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  pre={self.pre},\n  post={self.post},\n  inner_opt={inner}\n)"


def _make_inner(
    params: Params | None, InnerOpt: Optimizer | Callable[..., Optimizer], kwargs: dict[str, Any]
) -> Optimizer:
    if isinstance(InnerOpt, Optimizer):
        if params is not None or kwargs:
            given = ["params"] * (params is not None) + sorted(kwargs)
            raise TypeError(
                f"InnerOpt is an instance of {type(InnerOpt).__name__} already; leave out {', '.join(given)}"
            )
        inner_opt = InnerOpt
    else:
        factory = InnerOpt.func if isinstance(InnerOpt, functools.partial) else InnerOpt
        if not (isinstance(factory, type) and issubclass(factory, Optimizer)):
            raise TypeError(
                "InnerOpt must be a torch.optim.Optimizer type, a functools.partial of one or an instance, "
                f"got {InnerOpt!r}"
            )
        if params is None:
            raise ValueError(f"params are needed to make the inner optimizer, {factory.__name__}; got None")
        inner_opt = InnerOpt(params, **kwargs)
    if isinstance(inner_opt, ParamTransformingOptimizer):
        raise TypeError(
            "InnerOpt is a ParamTransformingOptimizer already; put its transforms and yours in one chain(...)"
        )
    return inner_opt


def _check_group(group_index: int, group: Group, chains: Mapping[str, Chain]) -> None:
    """Raise where a value in ``group`` is of the wrong type, is out of range or does not fit a parameter."""
    place = f"group {group_index}"
    known = {key for members in chains.values() for key in members.hyperparameters}
    prefixes = {key.rpartition(".")[0] for key in known}
    try:
        for key in group.keys() - known:
            prefix, dot, _ = key.rpartition(".")
            if dot and prefix in prefixes:
                raise ValueError(f'"{key}" is no hyperparameter; there are {sorted(known)}')
        param_ndim = require_param_ndim(group["param_ndim"])
        for key in ("grad_scale", "grad_bias"):
            if not isinstance(group[key], Real | Tensor) or isinstance(group[key], bool):
                raise TypeError(f"{key} must be a number, got {group[key]!r}")
        for slot, members in chains.items():
            place = f"{slot}, group {group_index}"
            members.check(group)
        if len(set(map(id, group["params"]))) < len(group["params"]):
            raise ValueError("a parameter appears twice; give it once")
        for index, param in enumerate(group["params"]):
            place = _describe(group_index, group, index)
            sub_ndim(param.ndim, param_ndim)
    except (TypeError, ValueError) as error:
        locate(error, place)
        raise


def _describe(group_index: int, group: Group, index: int) -> str:
    """Which parameter it is, by name where the group has names."""
    param = group["params"][index]
    name = f" {group['param_names'][index]!r}" if "param_names" in group else ""
    return f"group {group_index}, parameter {index}{name} of shape {tuple(param.shape)}, {param.dtype}"


def _make_grad_writable(param: Tensor, group: Group) -> None:
    grad = param.grad
    if grad is None:
        return
    if grad.layout is not torch.strided:
        raise TypeError(f"transforms need a dense gradient, got the layout {grad.layout}; use grad.to_dense()")
    if any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True)):
        param.grad = grad.contiguous()  # an expanded gradient: its elements share memory


def _run_hook(hook: Callable[..., None], param: Tensor, group: Group) -> None:
    """Call ``hook`` on ``param`` and its gradient in batch form, and carry over what it writes."""
    batch = to_batch(param.detach(), group["param_ndim"])
    originals = [(param, batch)]
    if param.grad is not None:
        batch_grad = batch.grad = to_batch(param.grad.detach(), group["param_ndim"])
        originals.append((param.grad, batch_grad))
    before = batch.grad
    hook(batch, optim_group=group)
    if batch.grad is not before:
        raise ValueError(
            f"{hook.__qualname__} rebinds param.grad; edit it in place: param.grad.copy_(...), param.grad.mul_(...)"
        )
    for original, batched in originals:
        if batched.data_ptr() != original.data_ptr():  # no view could be made
            original.copy_(batched.reshape(original.shape))


@contextmanager
def _restored_on_error(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give ``tensors`` back their values if the body raises."""
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
        raise


def _is_number(value: Any, number: float) -> bool:
    """Whether ``value`` is ``number``. Tensors are not read: that would synchronise the device."""
    return not isinstance(value, Tensor) and bool(value == number)
