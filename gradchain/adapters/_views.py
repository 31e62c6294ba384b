"""What there is to see of the chains around an optimizer, and what can be told to them, whatever put them there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from gradchain.adapters._trial import explain_step
from gradchain.engine.engine import Engine
from gradchain.engine.metrics import read_metrics
from gradchain.engine.signals import make_signals
from gradchain.explain import Explanation


class Views:
    """The methods that ``ParamTransformingOptimizer`` and what ``attach`` returns have in common."""

    def _see(self, method: str) -> Engine:
        """The engine; ``method`` asks for it."""
        raise NotImplementedError

    def explain(self) -> Explanation:
        """Show what each stage would do in the next step, over all parameters; call it after ``backward()``.

        The step is made, with copies of the gradients, and taken back: parameters, states and all else that the
        optimizer holds are as before. Where ``pre`` alone has transforms, the inner optimizer makes no step; else it
        must be one that makes it without a closure. Step hooks do not run. With a ``GradScaler``, call ``unscale_``
        before. A slot without transforms has no rows.

        The column ``runs`` says whether a stage was traced, and so runs as generated code, or runs as it is, and why.
        ``print(optimizer.explain().program)`` shows that code.

        Returns:
            An ``Explanation``; ``explanation["fc.weight"]``, or ``explanation[0]``, is that of one parameter.

        Example:
            >>> import torch
            >>> from gradchain import ParamTransformingOptimizer, normalize
            >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
            >>> optim = ParamTransformingOptimizer([x], pre=normalize(), param_ndim=None, lr=1.0)
            >>> x.square().sum().backward()
            >>> optim.explain()
            stage          acts on           2-norm     rms  min  max  mean  zero  non-finite  cosine  changed  runs
            gradient                             10   7.071    6    8     7    0%          0%       1
              normalize()  the whole tensor       1  0.7071  0.6  0.8   0.7    0%          0%       1     100%  traced
        """
        return explain_step(self._see("explain"))

    def metrics(self, *, per_parameter: bool = False) -> dict[str, float]:
        """What ``monitor``, clips and skips have seen, by name: ``self.log_dict(optimizer.metrics())`` in Lightning.

        The figures of a ``monitor`` are those of the last step in which it looked. ``share_clipped`` is the share of
        the units (tensors, rows or elements) that a clip made shorter, over the steps since the last call. The first
        call starts to count, so that nobody pays for it who never asks; what was not counted yet is left out.
        ``total`` and ``in_a_row`` count the steps that a transform has skipped. The device is waited for once. With
        shards, clips count the rows that this process has; all else is of the whole. A clip within
        ``with_error_feedback``, or within ``masked`` with a tensor, does not count.

        Args:
            per_parameter: Also the figures of each parameter, ``"pre/monitor/norm/fc.weight"``, by name or number.

        Example:
            >>> import torch
            >>> from gradchain import ParamTransformingOptimizer, chain, clip_by_norm, monitor
            >>> x = torch.tensor([[3.0, 4.0], [0.3, 0.4]], requires_grad=True)
            >>> optim = ParamTransformingOptimizer([x], pre=chain(monitor(), clip_by_norm(1.0)), lr=0.0)
            >>> _ = optim.metrics()
            >>> x.square().sum().backward()
            >>> optim.step()
            >>> metrics = optim.metrics()
            >>> list(metrics)
            ['pre/monitor/norm', 'pre/monitor/rms', 'pre/monitor/ratio', 'pre/monitor/zero', 'pre/monitor/nonfinite',
            'pre/clip_by_norm/share_clipped']
            >>> metrics["pre/monitor/ratio"], metrics["pre/clip_by_norm/share_clipped"]
            (2.0, 0.5)
        """
        engine = self._see("metrics")
        return read_metrics(engine, per_parameter=per_parameter)

    def signal(self, *, reduce: str | None = "mean", **values: float | Tensor) -> None:
        """Give transforms values from outside, such as the loss, which they read in the next step as ``group["loss"]``.

        They are for that step alone: a transform that reads one which was not given again is an error. A second value
        for the same step replaces the first. With ``step_in_backward``, give them before the backward pass.

        Args:
            reduce: What counts of the values of all processes of the default group, ``"mean"``, ``"sum"``, ``"min"`` or
                ``"max"``; then all of them have to call it. None keeps the value of each.
            **values: Numbers or tensors, which are copied to the device of the first parameter, half precision as
                float32, and are not read.

        Raises:
            TypeError: A value is neither a number nor a tensor.
            ValueError: The group has such a key already, or there is no such reduction.

        Example:
            >>> import torch
            >>> from gradchain import ParamTransformingOptimizer
            >>> x = torch.tensor([1.0], requires_grad=True)
            >>> pre = lambda tensor, group: tensor / (1 + group["loss"])
            >>> optim = ParamTransformingOptimizer([x], pre=pre, lr=1.0)
            >>> loss = 3 * x.sum()
            >>> loss.backward()
            >>> optim.signal(loss=loss)
            >>> optim.step()
            >>> x
            tensor([0.2500], requires_grad=True)
        """
        engine = self._see("signal")
        engine.signals |= make_signals(values, engine.owner.param_groups, reduce)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the ``with`` block, parameters have their averages, from ``param_ema`` or ``lookahead`` in ``post``.

        Parameters without an average, and all of them before the first step, stay as they are.

        Raises:
            ValueError: ``post`` keeps no average, or two of one parameter.

        Example:
            >>> import torch
            >>> from gradchain import ParamTransformingOptimizer, param_ema
            >>> x = torch.tensor([1.0], requires_grad=True)
            >>> optim = ParamTransformingOptimizer([x], post=param_ema(0.5, debias=False), lr=1.0)
            >>> x.grad = torch.tensor([1.0])
            >>> optim.step()
            >>> with optim.averaged():
            ...     print(x.item())
            0.5
            >>> x.item()
            0.0
        """
        engine = self._see("averaged")
        with engine.averaged():
            yield
