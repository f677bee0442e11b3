"""HARD: the identities of its card, whose parameters each step may touch, and the balance."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from stillhouse.distillation.objective import Progress
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.methods.classification.hard.augmentors import LearnedAffine, LearnedMix, RandomAffine
from stillhouse.methods.classification.hard.game import Game, augmentor_loss, balanced, disagreement
from stillhouse.methods.classification.hard.vae import (
    VAE,
    VAEAugmentor,
    VAEFit,
    draw_pixels,
    gaussian_kl,
    pixel_nll,
    spread,
)

SHAPE = (1, 8, 8)


def net(batch_norm: bool = True) -> nn.Module:
    layers = [
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4) if batch_norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 5),
    ]
    return nn.Sequential(*layers)


def game(**options: object) -> tuple[Game, dict[str, Tensor]]:
    student, teacher = net(), net()
    module = Game(student, FrozenTeacher(teacher), LearnedAffine([0.0]), **options)  # type: ignore[arg-type]
    module.train()
    return module, {"input": torch.randn(6, *SHAPE), "label": torch.arange(6) % 5}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("background", [[0.7], None])
def test_an_affine_augmentor_without_mean_or_noise_changes_nothing(background: list[float] | None) -> None:
    augmentor, x = LearnedAffine(background, sigma=1e-12), torch.randn(3, *SHAPE)
    torch.testing.assert_close(augmentor(x)[0], x, atol=1e-5, rtol=0)


def test_what_lies_outside_has_the_background_of_the_data() -> None:
    x = torch.full((2, *SHAPE), -0.8)
    torch.testing.assert_close(RandomAffine([-0.8], rotate=1.0, shift=0.5)(x)[0], x)


def test_maps_that_would_blank_the_image_are_left_out() -> None:
    augmentor, x = LearnedAffine([0.0], sigma=1e-12), torch.randn(2, *SHAPE)
    augmentor.mu.data = torch.tensor([-1.0, 0, 0, 0, -1.0, 0])
    torch.testing.assert_close(augmentor(x)[0], x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_learned_affine_gives_gradients_to_all_it_learns(kind: str) -> None:
    augmentor = LearnedAffine([0.0], covariance=kind)  # type: ignore[arg-type]
    augmentor(torch.randn(4, *SHAPE))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in augmentor.parameters())


def test_form_b_is_zero_with_no_gradient_where_nothing_changed() -> None:
    s, t = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    loss = augmentor_loss("B", s, t, s, t)
    gradients = torch.autograd.grad(loss, [s, t])
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert all(g.abs().max() < 1e-6 for g in gradients)


def test_a_student_equal_to_its_teacher_gives_the_augmentor_nothing_to_learn() -> None:
    twin = net(batch_norm=False)
    augmentor, x = LearnedAffine([0.0]), torch.randn(4, *SHAPE)
    changed, _ = augmentor(x)
    for form, lambda_teacher in (("A", 3.0), ("B", 1.0)):
        loss = augmentor_loss(form, twin(changed), twin(changed), twin(x), twin(x), lambda_teacher=lambda_teacher)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(loss, augmentor.mu, retain_graph=True)
        assert loss.item() == pytest.approx(0, abs=1e-6) and gradient.abs().max() < 1e-6


def test_a_teacher_that_does_not_mind_adds_nothing() -> None:
    t = torch.randn(4, 5)
    s, clean = torch.randn(4, 5), torch.randn(4, 5)
    assert augmentor_loss("B", s, t, clean, t, lambda_teacher=7).item() == pytest.approx(
        -disagreement(clean, s).item(), rel=1e-6
    )


@pytest.mark.parametrize("form", ["A", "B"])
def test_the_augmentors_gradient_is_that_of_finite_differences(form: str) -> None:
    student, teacher, augmentor = net(False).double(), net(False).double(), LearnedAffine([0.0]).double()
    x = torch.nn.functional.avg_pool2d(torch.randn(3, 1, 24, 24, dtype=torch.float64), 3)

    def loss() -> Tensor:
        torch.manual_seed(3)
        changed, _ = augmentor(x)
        return augmentor_loss(form, student(changed), teacher(changed), student(x), teacher(x))  # type: ignore[arg-type]

    gradients = torch.autograd.grad(loss(), [augmentor.mu, augmentor.log_sigma])
    for parameter, gradient in zip((augmentor.mu, augmentor.log_sigma), gradients):
        for i in (0, 2, 5):
            values = []
            for step in (1e-7, -1e-7):
                parameter.data[i] += step
                values.append(loss().item())
                parameter.data[i] -= step
            assert (values[0] - values[1]) / 2e-7 == pytest.approx(gradient[i].item(), rel=1e-3, abs=1e-6)


def test_an_augmentor_step_lowers_its_loss_on_the_same_noise_and_touches_nothing_else() -> None:
    module, batch = game(rate=1e-4)
    student, teacher = state(module.student), state(module._teacher[0].model)
    module.student.eval()
    clean = module._ask_student(batch["input"]).detach(), module._ask_teacher(batch["input"]).detach()
    values = []
    for _ in range(2):
        torch.manual_seed(0)
        values.append(module.learn(batch["input"], *clean).item())
    assert values[1] < values[0]
    assert same(student, state(module.student)) and same(teacher, state(module._teacher[0].model))
    assert all(p.grad is None for p in [*module.student.parameters(), *module._teacher[0].model.parameters()])


def test_a_whole_step_moves_the_student_by_its_optimizer_and_the_augmentor_by_its_own_only() -> None:
    module, batch = game()
    optimizer = torch.optim.SGD(module.param_groups(), lr=0.1)
    augmentor, teacher, statistics = (
        state(module.augmentor),
        state(module._teacher[0].model),
        module.student[1].running_mean.clone(),
    )
    module.before_step(batch, None)
    assert (
        not same(augmentor, state(module.augmentor))
        and torch.equal(statistics, module.student[1].running_mean)
        and module.student.training
    )
    augmentor = state(module.augmentor)
    terms = module(batch, Progress())
    terms["loss"].backward()
    optimizer.step()
    assert same(augmentor, state(module.augmentor)) and same(teacher, state(module._teacher[0].model))
    assert terms["loss"].item() == pytest.approx((terms["clean"] + terms["hard"]).item())
    assert not any(k.startswith("_teacher") or "teacher" in k for k in module.state_dict())


def test_the_augmentor_rests_above_the_upper_bound_until_the_lower() -> None:
    one, reference = torch.ones(()), torch.tensor(2.0)
    states, active = [], one
    for mean in (1.0, 2.1, 1.0, 0.11, 0.09, 1.9):
        active = balanced(active, torch.tensor(mean), reference, 0.05, 1.0)
        states.append(int(active))
    assert states == [1, 0, 0, 0, 1, 1]
    module, batch = game()
    module.active.zero_()
    augmentor = state(module.augmentor)
    module.before_step(batch, None)
    assert same(augmentor, state(module.augmentor))


def test_a_game_goes_on_from_its_state_to_the_same_augmentor() -> None:
    module, batch = game()
    module.before_step(batch, None)
    other = Game(copy.deepcopy(module.student), module._teacher[0], LearnedAffine([0.0]))
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    for m in (module, other):
        torch.manual_seed(1)
        m.train()
        m.before_step(batch, None)
    assert same(state(module.augmentor), state(other.augmentor))


def test_other_classes_are_refused() -> None:
    module = Game(net(), FrozenTeacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 7))), None)
    with pytest.raises(UserError, match="same classes"):
        module.build({"input": torch.randn(2, *SHAPE)})


def test_mixing_keeps_the_range_and_needs_a_partner() -> None:
    mix, x = LearnedMix(1, patch=4), torch.rand(5, *SHAPE)
    out = mix(x)[0]
    assert out.min() >= x.min() and out.max() <= x.max() and not torch.equal(out, x)
    out.sum().backward()
    assert mix.own.weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match="at least two"):
        mix(x[:1])


def test_the_pixel_mixture_is_a_distribution_over_grey_levels() -> None:
    levels = torch.linspace(-1, 1, 256).view(-1, 1, 1, 1)
    weights, means, scales = torch.randn(1, 3, 1, 1), torch.randn(1, 3, 1, 1, 1), spread(torch.randn(1, 3, 1, 1, 1) - 2)
    total = torch.exp(-pixel_nll(levels, *(v.expand(256, *v.shape[1:]) for v in (weights, means, scales)))).sum()
    assert total.item() == pytest.approx(1, abs=1e-3)
    drawn = draw_pixels(
        weights.expand(4000, -1, -1, -1), means.expand(4000, -1, -1, -1, -1), scales.expand(4000, -1, -1, -1, -1)
    )
    assert drawn.min() >= -1 and drawn.max() <= 1 and drawn.std() > 0


def test_the_divergence_of_gaussians_is_torchs() -> None:
    m_q, m_p, s_q, s_p = torch.randn(9), torch.randn(9), torch.rand(9) + 0.1, torch.rand(9) + 0.1
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(m_q, s_q), torch.distributions.Normal(m_p, s_p)
    )
    torch.testing.assert_close(gaussian_kl(m_q, s_q, m_p, s_p), expected)


def vae() -> VAE:
    return VAE(SHAPE, (0.3,), (0.4,), width=8, latent=2, levels=3)


@pytest.mark.parametrize("edit", ["posterior", "latent"])
def test_an_edit_that_has_not_learned_yet_is_the_plain_reconstruction(edit: str) -> None:
    net, x = vae(), torch.randn(3, *SHAPE)
    augmentor = VAEAugmentor(net, edit)  # type: ignore[arg-type]
    torch.manual_seed(0)
    edited, penalty = augmentor(x)
    torch.manual_seed(0)
    plain, _ = VAEAugmentor(copy.deepcopy(net), "finetune")(x)
    torch.testing.assert_close(edited, plain)
    assert penalty.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("edit", ["posterior", "latent", "finetune"])
def test_every_edit_learns_and_only_what_it_should(edit: str) -> None:
    augmentor = VAEAugmentor(vae(), edit, start=1 if edit != "finetune" else 0)  # type: ignore[arg-type]
    learned = [p for p in augmentor.parameters() if p.requires_grad]
    changed, penalty = augmentor(torch.randn(3, *SHAPE))
    (changed.square().sum() + penalty).backward()
    assert all(p.requires_grad == (edit == "finetune") for p in augmentor.vae.parameters())
    if edit != "finetune":
        assert len(learned) == 4 and all(p.grad.abs().sum() > 0 for p in learned)
    assert sum(float(p.grad.abs().sum()) for p in learned if p.grad is not None) > 0


def test_a_vae_fits_images() -> None:
    module, x = VAEFit(vae()), (torch.randn(32, *SHAPE) > 0).float() / 0.4 - 0.75
    optimizer = torch.optim.Adam(module.param_groups(), lr=1e-2)
    values = []
    for _ in range(25):
        loss = module({"input": x}, Progress())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.7 * values[0]


def test_an_image_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(UserError, match="4 levels halve the image 3 times, but it is 12 x 12"):
        VAE((1, 12, 12), (0.0,), (1.0,), levels=4)
