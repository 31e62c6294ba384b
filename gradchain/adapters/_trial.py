"""The next step of an optimizer, made to look at what its stages do, and taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradchain.adapters._snapshot import preserved
from gradchain.chain import Chain
from gradchain.contract import locate, show
from gradchain.engine.engine import Engine
from gradchain.engine.operations import Pass, SkippedStep
from gradchain.engine.plan import Plan
from gradchain.engine.step import Step, is_dry_run
from gradchain.explain import Explanation, Record, forked_rng

INPUTS = {"pre": "gradient", "update": "update", "post": "parameter"}
"""What the stages of a slot act on."""


def explain_step(engine: Engine) -> Explanation:
    """Show what each stage of the chains does in the next step.

    The plan that trains runs on the very parameters, and on copies of the gradients and states; then all is as before.
    """
    owner, record, program = engine.owner, Record(), ""
    states, params = engine.synced_states(), engine.param_table.params
    grads = [param.grad for param in params]
    with forked_rng(params), preserved([owner, owner.inner_opt], apart=[engine, *states.by_param.values()]):
        try:
            for param, grad in zip(params, grads, strict=True):
                param.grad = None if grad is None else grad.detach().clone()
            engine.complete_groups()
            if not is_dry_run(owner.param_groups):
                plans = Step(engine.trial()).plans or {}
                program = "\n".join(plan.listing() for plan in plans.values())
                _TrialStep(engine.trial(fused=False), plans, record).make()
        except SkippedStep:
            pass
        finally:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
    return record.explanation(program)


class _TrialStep(Step):
    """A step that goes through each slot stage by stage.

    Args:
        fused: The plans that train, in which stages share programs, by slot.
    """

    def __init__(self, engine: Engine, fused: Mapping[str, Plan], record: Record) -> None:
        self.fused = fused
        self.record = record
        super().__init__(engine)

    def make(self) -> None:
        """Do what a step does, as far as there is something to see."""
        self.transform_grads()
        if self.owner.update or self.owner.post:
            inner_opt = self.owner.inner_opt
            try:
                type(inner_opt).step(inner_opt)  # not what others have put in its place, such as a scheduler
            except Exception as error:
                locate(error, f"the step of {type(inner_opt).__name__}, which explain() makes without a closure")
                raise
            self.finish()

    def commit(self) -> None:
        """Keep nothing."""

    def _run(self, plan: Plan, tensors: list[Any], context: dict[str, list[Any]]) -> None:
        slot = plan.slot
        chain: Chain = getattr(self.owner, slot)
        stages = self.engine.stage(slot)
        shown = self._shown(slot, tensors, context, plan.touched)
        if not shown:
            return
        members = [self.param_table.entries[i] for i in shown]
        work = Pass(tensors, context, keeps_states=False)
        self.record.start(INPUTS[slot], list(shown.values()), [member.context(slot) for member in members])
        for index, (member, stage) in enumerate(zip(chain, stages.stages, strict=True)):
            place = stages.place(index)
            ways = [self.fused[slot].ways(place, number) for number in shown]
            try:
                plan.run_stage(place, work)
            except SkippedStep:
                self.record.note(show(member), stage, [torch.zeros_like(tensor) for tensor in shown.values()], ways)
                raise
            self.record.note(show(member), stage, list(shown.values()), ways)

    def _shown(
        self, slot: str, tensors: list[Any], context: dict[str, list[Any]], touched: list[int]
    ) -> dict[int, Tensor]:
        """The tensors that take part in a slot, whether something acts on them or not."""
        shown = {i: t for i, t in enumerate(tensors) if slot == "post" or self.grads[i] is not None}
        if slot == "update":  # where nothing acts, there is still the parameter
            shown.update({i: tensors[i] - context["param"][i] for i in shown.keys() - set(touched)})
        return {i: tensor.detach() for i, tensor in shown.items()}
