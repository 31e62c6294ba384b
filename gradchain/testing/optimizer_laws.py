"""The laws that an optimizer owes to those who use it as one of ``torch.optim``: ``check_optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from gradchain.contract import show
from gradchain.testing import _step_laws, _surroundings_laws
from gradchain.testing._problem import InapplicableError, Make, Shapes


def check_optimizer(make: Make, *, shapes: Shapes = ((4, 3), (3,)), skip: Collection[str] = ()) -> None:
    """Raise an ``AssertionError`` if an optimizer breaks one of the laws that those of ``torch.optim`` keep.

    =======================  =========================================================================================
    law                      what it says
    =======================  =========================================================================================
    ``lowers_loss``          20 steps lower a smooth convex loss.
    ``deterministic``        The same steps give the same numbers.
    ``in_place``             Parameters stay leaves, the same objects in the same memory; no state has a graph.
    ``keeps_gradients``      A step leaves gradients as they are.
    ``closure``              ``step(closure)`` evaluates it with gradients, returns its loss, steps as ``step()`` does.
    ``no_gradients``         A parameter without a gradient is left alone, and a step without any gradient does nothing.
    ``zero_gradients``       Steps with zero gradients, the first ones too, leave finite numbers.
    ``zero_grad``            ``zero_grad()`` leaves None, and zeros where ``set_to_none=False``.
    ``any_shape``            Parameters can be empty, without dimensions, or have four of them.
    ``any_layout``           Parameters that are not contiguous get the numbers of contiguous ones.
    ``half_precision``       bfloat16 parameters stay bfloat16, and finite.
    ``groups``               Two groups alike give the numbers of one; a group can be added later.
    ``named_parameters``     ``named_parameters()`` give the numbers of ``parameters()``, and names in the state dict.
    ``schedulers``           A scheduler gives the numbers of ``group["lr"]`` set by hand, and ``lr`` matters.
    ``hooks``                Hooks of the step and of the state dict run once each time.
    ``state_dict``           Steps go on where they were from a state dict that another optimizer loads.
    ``torch_save``           They do so through ``torch.save`` and the default ``torch.load``.
    ``pickles``              They do so in a pickle of parameters and optimizer.
    ``deepcopies``           They do so in a deepcopy of both.
    ``foreach``              ``foreach=True`` gives the numbers of ``foreach=False``, where there is a choice.
    ``grad_scaler``          A ``GradScaler`` gives the numbers of a loss that is not scaled, and skips an overflow.
    ``distributed_state``    ``torch.distributed.checkpoint`` gets and sets its state, and changes no parameter thereby.
    ``dtensor``              Parameters sharded over a mesh of one process get the numbers of whole ones.
    =======================  =========================================================================================

    A law is not tried where the optimizer lacks what it is about: where ``step`` needs a closure, ``grad_scaler`` and
    ``distributed_state``; where the groups have no ``foreach``, that law; where torch has no distributed package, those
    that need it; ``dtensor`` needs torch 2.12 or later. All laws together take about a second.

    Args:
        make: The type of an optimizer, or any function of parameters that makes one. The parameters come in all forms
            that ``torch.optim`` takes: a list, a generator, pairs with names, or dicts of groups.
        shapes: The shapes of the parameters; matrices alone, ``[(4, 3)]``, for an optimizer such as Muon.
        skip: Names of laws that are not for this optimizer.

    Raises:
        AssertionError: A law is broken. It says which, and how.

    Example:
        >>> check_optimizer(torch.optim.AdamW)
        >>> class Forgetful(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         super().step(closure)
        >>> check_optimizer(lambda params: Forgetful(params, lr=0.1))
        Traceback (most recent call last):
            ...
        AssertionError: <lambda> breaks the law "closure"
          cause: step(closure) returned None and not the loss
    """
    if unknown := set(skip) - set(LAWS):
        raise ValueError(f"skip names the laws {sorted(LAWS)}, got {sorted(unknown)}")
    for name in LAWS:
        try:
            cause = None if name in skip else how_broken(name, make, shapes)
        except InapplicableError:
            continue
        if cause is not None:
            raise AssertionError(f'{show(make)} breaks the law "{name}"\n  cause: {cause}')


def how_broken(law: str, make: Make, shapes: Shapes) -> str | None:
    """In what way an optimizer breaks a law, or None where it keeps it.

    Raises:
        InapplicableError: The law is about something that the optimizer does not have.
    """
    try:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(0)
            LAWS[law](make, shapes)
    except InapplicableError:
        raise
    except Exception as error:
        return str(error) if type(error) is AssertionError and str(error) else f"{type(error).__name__}: {error}"
    return None


LAWS: dict[str, Callable[[Make, Shapes], None]] = {
    law.__name__: law
    for law in (
        _step_laws.lowers_loss,
        _step_laws.deterministic,
        _step_laws.in_place,
        _step_laws.keeps_gradients,
        _step_laws.closure,
        _step_laws.no_gradients,
        _step_laws.zero_gradients,
        _step_laws.zero_grad,
        _step_laws.any_shape,
        _step_laws.any_layout,
        _step_laws.half_precision,
        _step_laws.groups,
        _step_laws.named_parameters,
        _step_laws.foreach,
        _surroundings_laws.schedulers,
        _surroundings_laws.hooks,
        _surroundings_laws.state_dict,
        _surroundings_laws.torch_save,
        _surroundings_laws.pickles,
        _surroundings_laws.deepcopies,
        _surroundings_laws.grad_scaler,
        _surroundings_laws.distributed_state,
        _surroundings_laws.dtensor,
    )
}
