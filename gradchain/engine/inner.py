"""The inner optimizer, made of what a user gives: an instance, a type, or several of either."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from gradchain._arguments import argument_names, did_you_mean
from gradchain.contract import Group, show
from gradchain.engine.combined import CombinedOptimizer
from gradchain.engine.groups import ATTACHED
from gradchain.engine.names import Names
from gradchain.engine.select import Key, Params, distribute, list_groups, name_and_param, override_groups

Factory: TypeAlias = Callable[..., Optimizer]
"""An optimizer type, or a ``functools.partial`` of one."""

InnerOptimizers: TypeAlias = Optimizer | Factory | Sequence[Optimizer] | Mapping[Any, Factory]
"""What the argument ``InnerOpt`` can be."""


def make_inner(
    params: Params | None,
    InnerOpt: InnerOptimizers,
    kwargs: dict[str, Any],
    groups: Mapping[Any, Mapping[str, Any]] | None,
    model: nn.Module | None,
    owner: type,
) -> Optimizer:
    """The inner optimizer: ``InnerOpt`` itself if it is one, else made of ``params`` and ``kwargs``.

    A mistyped one of ``kwargs`` can have meant an argument of ``owner``, the class of the optimizer around it.
    """
    if isinstance(params, Optimizer):
        raise TypeError(
            f"params must be parameters, got an optimizer, {type(params).__name__}; to put transforms "
            "around it, give it by keyword: ParamTransformingOptimizer(InnerOpt=...)"
        )
    if isinstance(params, nn.Module):
        raise TypeError(f"params must be parameters, got a module, {type(params).__name__}; give named_parameters()")
    if isinstance(InnerOpt, str):
        raise _no_factory(InnerOpt, "InnerOpt")
    if isinstance(InnerOpt, Optimizer | Sequence):
        instances: list[Optimizer] = [InnerOpt] if isinstance(InnerOpt, Optimizer) else list(InnerOpt)
        given = [*(["params"] * (params is not None)), *(["groups"] * (groups is not None)), *sorted(kwargs)]
        for index, instance in enumerate(instances):
            _require_free(instance, "InnerOpt" if isinstance(InnerOpt, Optimizer) else f"InnerOpt[{index}]", given)
        if not instances:
            raise ValueError("InnerOpt needs at least one optimizer, got an empty list")
        return InnerOpt if isinstance(InnerOpt, Optimizer) else CombinedOptimizer(instances)
    factories = InnerOpt if isinstance(InnerOpt, Mapping) else {"*": InnerOpt}
    for key, factory in factories.items():
        made = factory.func if isinstance(factory, functools.partial) else factory
        if not (isinstance(made, type) and issubclass(made, Optimizer)):
            raise _no_factory(factory, f"InnerOpt[{show(key)}]" if isinstance(InnerOpt, Mapping) else "InnerOpt")
    if params is None:
        raise ValueError(
            f"params are needed to make the inner optimizer, {', '.join(map(_name, factories.values()))}; got None"
        )
    if not isinstance(InnerOpt, Mapping):
        _require_arguments(InnerOpt, kwargs, owner)
        if not groups:
            return InnerOpt(params, **kwargs)
    given_groups = list_groups(params)
    names = _names(given_groups, model)
    given_groups = override_groups(given_groups, groups, names)
    if not isinstance(InnerOpt, Mapping):
        return InnerOpt(given_groups, **kwargs)
    if kwargs:
        raise TypeError(
            f"InnerOpt is a mapping of several optimizers, and {sorted(kwargs)} could be meant for any; give each its "
            "own, by functools.partial(torch.optim.AdamW, lr=...)"
        )
    return _make_several(given_groups, InnerOpt, names)


def _require_arguments(factory: Factory, kwargs: Mapping[str, Any], owner: type) -> None:
    known = argument_names(factory)
    if known is None:
        return
    for name in kwargs:
        if name not in known:
            raise TypeError(
                f"neither ParamTransformingOptimizer nor its inner optimizer, {_name(factory)}, has an argument "
                f"{name!r}{did_you_mean(name, [*signature(owner).parameters, *known])}"
            )


def _make_several(
    groups: Sequence[Group], factories: Mapping[Any, Factory], names: Mapping[Tensor, str]
) -> CombinedOptimizer:
    split = [distribute(group, list(factories), names) for group in groups]
    optimizers: dict[Key, Optimizer] = {}
    for index, (key, factory) in enumerate(factories.items()):
        taken = [each[index] for each in split if index in each]
        if taken:
            optimizers[key] = factory(taken)
        else:
            warnings.warn(
                f"InnerOpt has the key {show(key)}, which chooses no parameter, so that there is no {_name(factory)}: "
                "none matches it, or earlier keys have chosen all that do",
                stacklevel=4,
            )
    return CombinedOptimizer(list(optimizers.values()), list(optimizers))


def _names(groups: Sequence[Group], model: nn.Module | None) -> dict[Tensor, str]:
    params = [name_and_param(item, {})[1] for group in groups for item in group["params"]]
    return Names().joined_by(model, params).of(params)


def _require_free(instance: object, subject: str, given: Sequence[str]) -> None:
    """Raise where an instance cannot be an inner optimizer, or arguments were ``given`` that make one."""
    name = type(instance).__name__
    if not isinstance(instance, Optimizer):
        raise TypeError(
            f"{subject} must be an instance of torch.optim.Optimizer, got {instance!r}; to choose by name,"
            ' give a mapping such as {"*.weight": torch.optim.SGD}'
        )
    if given:
        raise TypeError(f"{subject} is an instance of {name} already; leave out {', '.join(given)}")
    if ATTACHED in instance.__dict__:
        raise TypeError(
            f"{subject}, {name}, has attached transforms; call remove() on what attach returned, "
            "and put them in one chain(...) with yours"
        )


def _no_factory(factory: object, subject: str) -> TypeError:
    return TypeError(
        f"{subject} must be a torch.optim.Optimizer type, a functools.partial of one or an instance, got {factory!r}"
    )


def _name(factory: Factory) -> str:
    return show(factory.func if isinstance(factory, functools.partial) else factory)
