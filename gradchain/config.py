"""Chains and optimizers as plain data, in the form of Hydra: ``to_config``, and ``from_config`` back."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import gradchain
from gradchain._arguments import argument_names, did_you_mean
from gradchain._ranges import as_number
from gradchain.adapters.attach import Attached, attach
from gradchain.adapters.optimizer import ParamTransformingOptimizer
from gradchain.bound import BoundTransform
from gradchain.contract import FromGroup, Transform, as_numbers, is_same, locate, show
from gradchain.engine.combined import CombinedOptimizer
from gradchain.engine.groups import OF_ANY, hyperparameters
from gradchain.engine.states import SLOTS
from gradchain.stage import Stage

_KEYS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")
_GET_OBJECT = "hydra.utils.get_object"
_NAMED = "gradchain.bound.BoundTransform.named"

_OF_DATA: dict[str, Any] = {
    "builtins.dict": dict,
    "torch.tensor": torch.tensor,
    _NAMED: BoundTransform.named,
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}
"""Names that ``to_config`` writes beside those of ``gradchain``: what they make is data."""


def to_config(value: Transform | ParamTransformingOptimizer | Attached) -> dict[str, Any]:
    """Write a chain, or an optimizer with its chains, as plain dicts and lists, for JSON or YAML.

    The form is that of Hydra: ``_target_`` is the name of what is called, ``_args_`` are positional arguments, and with
    ``_partial_`` the call has to wait for more. Arguments that have their defaults are left out. Transforms, functions
    and optimizer types of your own are written by their import paths. Infinite numbers stay numbers of Python, which
    ``json`` and ``yaml`` write and read.

    Of an optimizer this is what makes another one like it: chains, options and the arguments of the inner optimizer.
    Parameters, their states and what single param groups have of their own are not in it; they are in the state dict.

    Args:
        value: A transform, a ``ParamTransformingOptimizer``, or what ``attach`` returned.

    Raises:
        TypeError: A function has no import path, as a lambda or one that is defined in a function, or something is no
            plain data, as a random generator. The error says where it is.

    Example:
        >>> from gradchain import chain, clip_by_norm, sign
        >>> to_config(chain(sign(), clip_by_norm(1.0)))
        {'_target_': 'gradchain.chain', '_args_': [{'_target_': 'gradchain.sign'},
         {'_target_': 'gradchain.clip_by_norm', 'max_norm': 1.0}]}

    References:
        https://hydra.cc/docs/advanced/instantiate_objects/overview.
    """
    if not (isinstance(value, Stage | ParamTransformingOptimizer | Attached) or _path_of(value)):
        raise TypeError(
            "to_config needs a transform, a ParamTransformingOptimizer or what attach returned, got "
            f"{type(value).__name__ if isinstance(value, Optimizer) else show(value)}"
        )
    config: dict[str, Any] = _write(value, "")
    return config


def from_config(config: Any, /, *args: Any, allow: Sequence[str] = (), **kwargs: Any) -> Any:
    """Make what a config describes: a chain, an optimizer, or dicts and lists of these.

    The config comes from ``to_config``, ``json.loads``, ``yaml.safe_load``, OmegaConf or your own hands; see
    ``to_config`` for its form. It is data: no code in it is evaluated, and it can call nothing but the public names of
    ``gradchain`` and what ``allow`` adds. Errors say where in the config it is, as in ``InnerOpt["*.weight"].lr``.

    Args:
        config: Dicts and lists, in which a dict with ``_target_`` is a call. All else is passed on as it is.
        *args: The positional arguments of the outermost call, in place of ``_args_``: the parameters for a
            ``ParamTransformingOptimizer``, the optimizer for ``attach``.
        allow: The further names that may be called, and modules or packages all of whose names may be:
            ``["torch.optim", "mylib.transforms"]``. What such a module has itself imported is not among them.
        **kwargs: Keyword arguments of the outermost call, as in ``model=model``. They win over the config.

    Raises:
        ValueError: A name is not allowed or does not exist, or a value is out of range.
        TypeError: The config is a string, an argument has the wrong name or type, or a name is that of nothing to call.

    Example:
        >>> import torch
        >>> config = {
        ...     "_target_": "gradchain.ParamTransformingOptimizer",
        ...     "InnerOpt": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 3e-4},
        ...     "pre": {"_target_": "gradchain.clip_by_norm", "max_norm": 1.0},
        ...     "param_ndim": None,
        ... }
        >>> optimizer = from_config(config, torch.nn.Linear(3, 2).named_parameters(), allow=["torch.optim"])
        >>> optimizer.pre, optimizer.param_groups[0]["lr"]
        (chain(clip_by_norm(max_norm=1.0)), 0.0003)
        >>> from_config({"_target_": "gradchain.clip_by_norm", "max_norm": -1.0})
        Traceback (most recent call last):
            ...
        ValueError: clip_by_norm.max_norm must be > 0, got -1.0
    """
    if isinstance(allow, str) or not all(isinstance(name, str) for name in allow):
        raise TypeError(f"allow must be a sequence of names, such as ['torch.optim'], got {allow!r}")
    if not isinstance(config, Mapping | Sequence) or isinstance(config, str | bytes):
        raise TypeError(f"config must be a dict or a list, as json.loads or yaml.safe_load gives, got {config!r}")
    if isinstance(config, Mapping) and "_target_" in config:
        return _call(config, "", allow, True, args, kwargs)
    if args or kwargs:
        raise TypeError("config has no _target_, the name of what is to get the arguments")
    return _build(config, "", allow, True)


# From a config


def _build(node: Any, path: str, allow: Sequence[str], recursive: bool) -> Any:
    if isinstance(node, Mapping):
        if "_target_" in node:
            return _call(node, path, allow, recursive)
        return {key: _build(value, _join(path, key), allow, recursive) for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str | bytes):
        return [_build(value, f"{path}[{index}]", allow, recursive) for index, value in enumerate(node)]
    return node


def _call(
    node: Mapping[str, Any],
    path: str,
    allow: Sequence[str],
    recursive: bool,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    place = _join(path, "_target_")
    recursive = node.get("_recursive_", recursive)
    own = {key: value for key, value in node.items() if key not in _KEYS}
    if node["_target_"] == _GET_OBJECT:
        return _find(own.get("path"), _join(path, "path"), allow)
    target = _find(node["_target_"], place, allow)
    if not callable(target):
        raise TypeError(
            f"{place}: {node['_target_']} is nothing to call, but {target!r}; the object itself is "
            f"{{_target_: {_GET_OBJECT}, path: {node['_target_']}}}"
        )
    own_args = node.get("_args_", [])
    if isinstance(own_args, str) or not isinstance(own_args, Sequence):
        raise TypeError(f"{_join(path, '_args_')} must be a list, got {own_args!r}")
    _check_names(target, own, path)
    if recursive:
        own_args = [] if args else _build(own_args, _join(path, "_args_"), allow, recursive)
        own = {key: _build(value, _join(path, key), allow, recursive) for key, value in own.items()}
    call = functools.partial(target, *(args or own_args), **{**own, **(kwargs or {})})
    if node.get("_partial_", False):
        return call
    try:
        return call()
    except Exception as error:
        if path:
            locate(error, path)
        raise


def _join(path: str, key: object) -> str:
    if not (isinstance(key, str) and key.isidentifier()):
        return f'{path}["{key}"]' if isinstance(key, str) else f"{path}[{key!r}]"
    return f"{path}.{key}" if path else key


def _check_names(target: Any, names: Iterable[str], path: str) -> None:
    """Raise where ``target`` has no argument of a name, at its place, and not only when it is called."""
    known = argument_names(target)
    if known is None:
        return
    for name in names:
        if name not in known:
            hint = did_you_mean(str(name), known) or f"; there are {known}"
            raise TypeError(f"{_join(path, name)}: {show(target)} has no argument {name!r}{hint}")


def _find(name: Any, place: str, allow: Sequence[str]) -> Any:
    """What has the name, if it may be used."""
    if not isinstance(name, str):
        raise TypeError(f"{place} must be a name, such as gradchain.chain, got {name!r}")
    if name in _OF_DATA:
        return _OF_DATA[name]
    package, _, own_name = name.partition(".")
    # A config that could call ``from_config`` could allow itself everything.
    public = [each for each in gradchain.__all__ if each not in ("from_config", "to_config")]
    if package == "gradchain" and own_name in public:
        return getattr(gradchain, own_name)
    if _is_allowed(name, allow):
        return _import(name, place, allow)
    if package == "gradchain":
        raise ValueError(f"{place}: gradchain has no {own_name!r} for configs{did_you_mean(own_name, public)}")
    raise ValueError(
        f"{place}: {name} is not allowed; allowed are the names of gradchain{''.join(f', {each}' for each in allow)}. "
        f"If you trust it, give from_config(..., allow={[*allow, name.rpartition('.')[0] or name]!r})"
    )


def _is_allowed(name: str, allow: Sequence[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in allow)


def _import(name: str, place: str, allow: Sequence[str]) -> Any:
    parts, is_exact = name.split("."), name in allow
    found: Any = None
    for index, part in enumerate(parts):
        path = ".".join(parts[: index + 1])
        if part.startswith("__") and path != "__main__":
            raise ValueError(f"{place}: {name} has {part!r}, which Python keeps to itself; give a function or a class")
        if index == 0 or (isinstance(found, ModuleType) and not hasattr(found, part)):
            try:
                found = importlib.import_module(path)
            except ModuleNotFoundError as error:
                raise ValueError(f"{place}: {name} cannot be imported: {error}") from error
        elif isinstance(found, ModuleType | type) and hasattr(found, part):
            found = getattr(found, part)
        else:
            raise ValueError(f"{place}: {'.'.join(parts[:index])} has no {part!r}")
        if isinstance(found, ModuleType) and found.__name__ != path and not is_exact:
            _refuse(name, ".".join([found.__name__, *parts[index + 1 :]]), place)
    # A module can also have imported a function: only what is allowed itself is.
    origin = getattr(found, "__module__", None) if hasattr(found, "__qualname__") else None
    if isinstance(origin, str) and not is_exact and not _is_allowed(origin, allow):
        _refuse(name, f"{origin}.{found.__qualname__}", place)
    return found


def _refuse(name: str, origin: str, place: str) -> None:
    raise ValueError(f"{place}: {name} is {origin}, which is not allowed; if you trust it, allow {name!r} by itself")


# To a config


def _write(value: Any, path: str) -> Any:
    """``value`` as plain data; ``path`` says where it is."""
    value = as_number(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return [_write(each, f"{path}[{index}]") for index, each in enumerate(value)]
    if isinstance(value, Mapping):
        written = {key: _write(each, _join(path, key)) for key, each in value.items()}
        # JSON has no keys but strings, and yaml.safe_dump sorts them, where the first pattern that matches may count.
        if all(isinstance(key, str) for key in written) and list(written) == sorted(written):
            return written
        return {"_target_": "builtins.dict", "_args_": [[[_write(key, path), each] for key, each in written.items()]]}
    if isinstance(value, Tensor):
        data, options = as_numbers(value)
        return {"_target_": "torch.tensor", "data": data, **{key: _write(each, path) for key, each in options.items()}}
    if isinstance(value, BoundTransform):
        config = _write_call(value.definition.factory, (), value.arguments, path)
        if not (value.is_named or value.own_keys):
            return config
        return {"_target_": _NAMED, "_args_": [config, value.prefix][: 1 + value.is_named], **value.own_keys}
    if isinstance(value, Stage):
        call: Any = value.__reduce__()  # it is pickled as the call that made it
        return _write_call(call[0], call[1], {}, path)
    if isinstance(value, ParamTransformingOptimizer | Attached):
        return _write_optimizer(value, path)
    if isinstance(value, functools.partial):
        args = {"_args_": _write(value.args, _join(path, "_args_"))} if value.args else {}
        keywords = {key: _write(each, _join(path, key)) for key, each in value.keywords.items()}
        return {"_target_": _name_of(value.func, path), "_partial_": True, **args, **keywords}
    if isinstance(value, FromGroup | torch.dtype):
        return {"_target_": _GET_OBJECT, "path": f"gradchain.{value!r}" if isinstance(value, FromGroup) else str(value)}
    return {"_target_": _GET_OBJECT, "path": _name_of(value, path)}


def _write_call(target: Any, args: Sequence[Any], keywords: Mapping[str, Any], path: str) -> dict[str, Any]:
    config: dict[str, Any] = {"_target_": _name_of(target, path)}
    signature = inspect.signature(target)
    for key, value in signature.bind_partial(*args, **keywords).arguments.items():
        parameter = signature.parameters[key]
        if parameter.kind is parameter.VAR_POSITIONAL:
            config["_args_"] = _write(value, _join(path, "_args_"))
        elif not is_same(value, parameter.default):
            config[key] = _write(value, _join(path, key))
    return config


def _write_optimizer(optimizer: ParamTransformingOptimizer | Attached, path: str) -> dict[str, Any]:
    chains = {slot: getattr(optimizer, slot) for slot in SLOTS}
    arguments: dict[str, Any] = {slot: c[0] if len(c) == 1 else c for slot, c in chains.items() if c}
    if isinstance(optimizer, Attached):
        arguments |= {
            "param_ndim": optimizer.defaults["param_ndim"],
            "defaults": dict(sorted(optimizer._given.items())) or None,
        }
        return _write_call(attach, (), arguments, path)
    own, of_chains = optimizer._own_defaults, hyperparameters(optimizer._engine.chains())
    rest = {k: v for k, v in own.items() if k not in OF_ANY and not (k in of_chains and is_same(v, of_chains[k]))}
    arguments |= {"InnerOpt": _inner(optimizer.inner_opt, own, path), **{key: own[key] for key in OF_ANY}}
    arguments["groups"] = optimizer._overrides
    return _write_call(type(optimizer), (), {**arguments, "defaults": dict(sorted(rest.items())) or None}, path)


def _inner(inner_opt: Optimizer, own: Mapping[str, Any], path: str) -> Any:
    """The call that makes an inner optimizer, by its type and its defaults, or the calls of several, by their keys."""
    if isinstance(inner_opt, CombinedOptimizer):
        if inner_opt.keys is None:
            raise TypeError(
                f"{_join(path, 'InnerOpt')}: several optimizers must say which parameters each takes to be written, "
                'and a list does not; give a mapping, such as {"*.weight": torch.optim.Muon, "*": torch.optim.AdamW}'
            )
        return {key: _inner(each, own, path) for key, each in zip(inner_opt.keys, inner_opt.optimizers, strict=True)}
    _, *parameters = inspect.signature(type(inner_opt)).parameters.values()
    parameters = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    given = {key: value for key, value in inner_opt.defaults.items() if key not in own}
    lacking = [each.name for each in parameters if each.default is each.empty and each.name not in given]
    if lacking:
        raise TypeError(f"{_join(path, 'InnerOpt')}: {type(inner_opt).__name__} does not tell its arguments {lacking}")
    changed = {
        each.name: given[each.name]
        for each in parameters
        if each.name in given and not is_same(given[each.name], each.default)
    }
    return functools.partial(type(inner_opt), **changed)


def _name_of(value: Any, path: str) -> str:
    name = _path_of(value)
    if name is None:
        remedy = (
            "has no import path; define it with def at the top level of a module, and import it from there"
            if hasattr(value, "__qualname__")
            else "is no plain data; leave it out, and name a function in the config that makes it"
        )
        raise TypeError(f"{path or 'the value'}: {show(value)} {remedy}")
    return name


def _path_of(value: Any) -> str | None:
    """The shortest import path of a function or a class, if it has one."""
    module, own_name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(own_name, str)):
        return None
    for prefix in itertools.accumulate(module.split("."), "{}.{}".format):
        name = f"{prefix}.{own_name}"
        try:
            if _import(name, "", [name]) is value:
                return name
        except ValueError:
            continue
    return None
