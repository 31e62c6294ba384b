"""The names of parameters, for optimizers that were made without them: those in a model."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
"""Where ``torch.compile``, wrappers of torch and Fabric keep the module that they wrap."""

WRAPPED_BY_PEFT = {"base_model", "model", "base_layer", "modules_to_save"}
"""Where modules of PEFT keep the modules that they wrap, or that take their place."""


class Names:
    """The names that parameters have in models, none of which it keeps alive."""

    def __init__(self, models: Iterable[weakref.ref[nn.Module]] = ()) -> None:
        self._models = list(models)
        self._known: dict[Tensor, str] = {}

    def joined_by(self, model: nn.Module | None, params: Collection[Tensor]) -> Names:
        """These, and the names that some of ``params`` have in ``model``, which win."""
        if model is None:
            return self
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        found = named_parameters(model)
        if params and not any(param in found for param in params):
            raise ValueError(
                f"model, a {type(model).__name__}, has none of the parameters of the optimizer; give the model that "
                "the optimizer was made for"
            )
        names = Names([*self._models, weakref.ref(model)])
        names._known = dict(self._known)
        return names

    def of(self, params: Iterable[Tensor]) -> dict[Tensor, str]:
        """The names of those that have one, which a model that is gone may have told before."""
        if self._models:
            found = dict(self._known)
            for model in filter(None, (ref() for ref in self._models)):
                found.update(named_parameters(model))
            self._known = {param: found[param] for param in params if param in found}
        return self._known

    def __getstate__(self) -> dict[Tensor, str]:
        return self._known  # by parameter, so that a copy has those of its own

    def __setstate__(self, known: dict[Tensor, str]) -> None:
        self._models, self._known = [], known


def named_parameters(model: nn.Module) -> dict[Tensor, str]:
    """The names of all parameters, without what wrappers add to them; a shared parameter has its first name.

    Example:
        >>> model = DataParallel(nn.Sequential(nn.Linear(2, 2)))
        >>> [name for name, _ in model.named_parameters()], list(named_parameters(model).values())
        (['module.0.weight', 'module.0.bias'], ['0.weight', '0.bias'])
    """
    names: dict[Tensor, str] = {}
    for name, param in _walk(model, (), set(), is_adapter=False):
        names.setdefault(param, name)
    return names


def _walk(
    module: nn.Module, path: tuple[str, ...], seen: set[nn.Module], *, is_adapter: bool
) -> Iterator[tuple[str, Tensor]]:
    """The parameters with their names; ``is_adapter`` says that ``module`` is a part of a module of PEFT."""
    seen.add(module)
    # Such a part has its modules or parameters by adapter. The name of an only one, mostly "default", says nothing.
    is_only = is_adapter and isinstance(module, nn.ModuleDict | nn.ParameterDict) and len(module) == 1
    for name, param in module.named_parameters(recurse=False):
        yield ".".join(path if is_only else (*path, name)), param
    for name, child in module.named_children():
        if child not in seen:
            below = path if is_only or _wraps(module, name) else (*path, name)
            yield from _walk(child, below, seen, is_adapter=_is_of_peft(module))


def _wraps(module: nn.Module, name: str) -> bool:
    """Whether ``module`` stands for its child of that name."""
    if name == "module":
        return isinstance(module, DataParallel | DistributedDataParallel)
    return name in WRAPPED or (name in WRAPPED_BY_PEFT and _is_of_peft(module))


def _is_of_peft(module: nn.Module) -> bool:
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)
