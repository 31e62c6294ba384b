"""The attacks of ``docs/how-to/attack-images.md``, against libraries of attacks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradchain import Transform, chain, project_ball_around_reference, sign, trace
from tests.frameworks.common import code_of

RADIUS, LR, STEPS = 0.1, 0.03, 7


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    return code_of("how-to/attack-images.md")


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 6 * 6, 10)
    model = nn.Sequential(*layers).double().eval().requires_grad_(False)
    return model, torch.rand(5, 3, 8, 8, dtype=torch.float64), torch.arange(5)


def theirs(name: str, *problem: Any, **options: Any) -> Tensor:
    torchattacks = pytest.importorskip("torchattacks")
    model, images, labels = problem
    attacked: Tensor = getattr(torchattacks, name)(model, **options)(images, labels)
    return attacked


def foolbox(name: str, *problem: Any, **options: Any) -> Tensor:
    foolbox = pytest.importorskip("foolbox")
    model, images, labels = problem
    attack = getattr(foolbox.attacks, name)(**options)
    attacked: Tensor = attack(
        foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), images, labels, epsilons=RADIUS
    )[1]
    return attacked


def test_fgsm(page: dict[str, Any], problem: Any) -> None:
    ours = page["fgsm"](*problem, radius=RADIUS)
    torch.testing.assert_close(ours, theirs("FGSM", *problem, eps=RADIUS))
    torch.testing.assert_close(ours, foolbox("FGSM", *problem, random_start=False))


def test_pgd_from_a_random_start(page: dict[str, Any], problem: Any) -> None:
    torch.manual_seed(1)
    ours = page["pgd"](*problem, radius=RADIUS, lr=LR, steps=STEPS)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, theirs("PGD", *problem, eps=RADIUS, alpha=LR, steps=STEPS))


def in_ball(page: dict[str, Any], problem: Any, start: Tensor, steps: int, pre: Transform | None = None) -> Tensor:
    bounds = project_ball_around_reference(RADIUS, reference=problem[1], ord=torch.inf, lower=0, upper=1)
    attacked: Tensor = page["attack"](*problem, start, pre=pre or sign(), post=bounds, lr=LR, steps=steps)
    return attacked


def test_one_step_from_a_random_start(page: dict[str, Any], problem: Any) -> None:
    torch.manual_seed(1)
    expected = theirs("FFGSM", *problem, eps=RADIUS, alpha=LR)
    torch.manual_seed(1)
    start = (problem[1] + torch.randn_like(problem[1]).uniform_(-RADIUS, RADIUS)).clamp(0, 1)
    torch.testing.assert_close(in_ball(page, problem, start, 1), expected)


def test_bim(page: dict[str, Any], problem: Any) -> None:
    ours = in_ball(page, problem, problem[1], STEPS)
    torch.testing.assert_close(ours, theirs("BIM", *problem, eps=RADIUS, alpha=LR, steps=STEPS))
    torch.testing.assert_close(ours, foolbox("LinfBasicIterativeAttack", *problem, abs_stepsize=LR, steps=STEPS))


@pytest.mark.parametrize("radius", [RADIUS, 1.0])
def test_pgd_l2(page: dict[str, Any], problem: Any, radius: float) -> None:
    ours = page["pgd_l2"](*problem, radius=radius, lr=LR, steps=STEPS)
    options = {"eps": radius, "alpha": LR, "steps": STEPS, "random_start": False}
    torch.testing.assert_close(ours, theirs("PGDL2", *problem, **options), rtol=1e-6, atol=1e-8)
    if radius == RADIUS:
        options = {"abs_stepsize": LR, "steps": STEPS, "random_start": False}
        torch.testing.assert_close(ours, foolbox("L2PGD", *problem, **options))


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_mi_fgsm(page: dict[str, Any], problem: Any, decay: float) -> None:
    ours = page["mi_fgsm"](*problem, radius=RADIUS, lr=LR, steps=STEPS, decay=decay)
    torch.testing.assert_close(ours, theirs("MIFGSM", *problem, eps=RADIUS, alpha=LR, steps=STEPS, decay=decay))


def test_momentum_of_signs(page: dict[str, Any], problem: Any) -> None:
    ours = in_ball(page, problem, problem[1], STEPS, chain(sign(), trace(0.5), sign()))
    options = {"abs_stepsize": LR, "steps": STEPS, "momentum": 0.5, "random_start": False}
    torch.testing.assert_close(ours, foolbox("MIFGSM", *problem, **options))


def test_frank_wolfe(page: dict[str, Any], problem: Any) -> None:
    """By the formula of Jaggi (2013), since neither library has it."""
    model, images, labels = problem
    change = torch.zeros_like(images)
    for step in range(STEPS):
        change.requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(model(images + change), labels, reduction="sum"), change)
        gamma = 2 / (2 + step)
        change = ((1 - gamma) * change.detach() + gamma * RADIUS * grad.sign()).clamp(-images, 1 - images)
    torch.testing.assert_close(page["frank_wolfe_attack"](*problem, radius=RADIUS, steps=STEPS), images + change)
