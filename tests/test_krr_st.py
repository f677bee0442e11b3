"""KRR-ST: its ridge regression is exact in both forms, the pool restarts and heals, gradients stay off the network, and
the set pre-trains a backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.methods.datasets.krr_st import RepresentationSet
from stillhouse.methods.datasets.krr_st.ridge import Pool, Regressor, outer_loss, ridge_prediction
from stillhouse.methods.datasets.krr_st.target import barlow_twins_loss
from stillhouse.models.convnet import ConvNet
from stillhouse.models.resnet import ResNet
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate


def tree(**given) -> dict:
    net = {"model": "stillhouse:convnet2", "options": {"width": 4, "norm": "batch"}}
    return {
        "method": "krr_st",
        "data": {"name": "digits", "augment": "plain", "size": 200, "test_size": 100},
        "network": net,
        "target": {
            "network": net,
            "epochs": 1,
            "batch_size": 50,
            "projector": 8,
            "augment": {"groups": "", "always": "crop"},
        },
        "images": 12,
        "iterations": 6,
        "batch_real": 20,
        "augment": {"groups": "", "always": "crop"},
        "pool": {"networks": 2, "limit": 3},
        "evaluate": {"networks": 1, "pretrain": {"epochs": 2}, "iterations": 3},
        **given,
    }


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(slot: int = 0, generation: int = 0) -> Regressor:
    torch.manual_seed(100 * slot + generation)
    return Regressor(ConvNet(4, 2, "batch", num_classes=3, input_shape=(3, 8, 8)), (3, 8, 8), 3)


@pytest.mark.parametrize(("m", "p"), [(5, 9), (20, 4), (1, 1)])
def test_the_kernel_form_is_the_linear_head_that_ridge_regression_finds(m: int, p: int):
    f_s, f_r, y = draw(m, p), draw(6, p, seed=1), draw(m, 3, seed=2)
    predicted, lam = ridge_prediction(f_s, y, f_r, 1e-3)
    a, b = (torch.cat([f, torch.ones(len(f), 1, dtype=f.dtype)], 1) for f in (f_s, f_r))
    assert torch.allclose(lam, 1e-3 * a.square().sum())
    head = torch.linalg.solve(a.T @ a + lam * torch.eye(p + 1, dtype=a.dtype), a.T @ y)
    assert torch.allclose(predicted, b @ head, atol=1e-8)


def test_a_vanishing_ridge_returns_the_targets_and_an_endless_one_nothing():
    f, y = draw(5, 9), draw(5, 3, seed=2)
    assert torch.allclose(ridge_prediction(f, y, f, 1e-12)[0], y, atol=1e-6)
    assert ridge_prediction(f, y, f, 1e12)[0].abs().max() < 1e-9


def test_the_outer_gradient_is_that_of_finite_differences_with_the_ridge_held():
    network, x, y = net().double().eval(), draw(4, 3, 8, 8), draw(4, 3, seed=2)
    real, wanted = draw(5, 3, 8, 8, seed=3), draw(5, 3, seed=4)
    x.requires_grad_(), y.requires_grad_()
    grads = torch.autograd.grad(outer_loss(network, x, y, real, wanted, 1e-6)["loss"], [x, y])
    assert all(p.grad is None for p in network.parameters())
    for leaf, grad in zip((x, y), grads):
        along = torch.randn_like(leaf)
        step = 1e-5 * along / along.norm()
        with torch.no_grad():
            sides = [
                outer_loss(
                    network, x + (s * step if leaf is x else 0), y + (s * step if leaf is y else 0), real, wanted, 1e-6
                )
                for s in (1, -1)
            ]
            slope = (sides[0]["loss"] - sides[1]["loss"]) / 2
        assert torch.allclose((grad * step).sum(), slope, rtol=1e-2)


def test_single_images_and_dimensions_work_and_misfits_are_refused():
    assert ridge_prediction(draw(1, 1).float(), draw(1, 1).float(), draw(1, 1).float())[0].shape == (1, 1)
    with pytest.raises(UserError, match="regresses targets"):
        ridge_prediction(draw(3, 2), draw(4, 2), draw(5, 2))
    with pytest.raises(UserError, match="at least one"):
        ridge_prediction(draw(3, 2), draw(3, 2), draw(0, 2))


@pytest.mark.parametrize("literal", [False, True])
def test_a_network_at_its_limit_begins_anew_and_as_released_stays_untrained(literal: bool):
    pool, x, y = Pool(net, 1, 2, literal=literal), draw(4, 3, 8, 8).float(), draw(4, 3, seed=1).float()
    for _ in range(2):
        pool.learn(0, x, y)
    assert pool.steps == [2] and pool.generations == [0]
    pool.learn(0, x, y)
    assert pool.generations == [1] and pool.steps == [2 if literal else 0]
    assert all(torch.equal(a, b) for a, b in zip(pool.networks[0].parameters(), net(0, 1).parameters()))
    pool.learn(0, x, y)
    assert pool.generations == [2 if literal else 1] and pool.steps == [2 if literal else 1]


def test_a_diverged_network_is_replaced_at_its_next_visit():
    pool, x = Pool(net, 1, 100), draw(4, 3, 8, 8).float()
    assert pool.learn(0, x, torch.full((4, 3), 1e38)).item() == 0  # its square overflows
    found = pool.visit(0)
    assert pool.generations == [1] and all(p.isfinite().all() for p in found.parameters()) and not found.training


def test_a_pool_goes_on_from_its_saved_state():
    x, y = draw(4, 3, 8, 8).float(), draw(4, 3, seed=1).float()
    one, other = Pool(net, 2, 3), Pool(net, 2, 3)
    for slot in (0, 1, 0, 0, 0):
        one.learn(slot, x, y)
    other.load_state_dict(one.state_dict())
    for pool in (one, other):
        pool.learn(0, x, y)
    assert one.steps == other.steps and one.generations == other.generations
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.networks[0].state_dict().values(), other.networks[0].state_dict().values())
    )


def test_the_classifier_of_any_network_is_cut_off():
    assert net().features == 16 and net()(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    deep = Regressor(ResNet(8, (8, 12), (1, 1), num_classes=7), (3, 32, 32), 5)
    assert deep.embed(torch.zeros(2, 3, 32, 32)).shape == (2, deep.features) and deep(
        torch.zeros(2, 3, 32, 32)
    ).shape == (2, 5)


def test_the_published_backbone_widens_by_stage():
    widens = ConvNet([4, 6, 8], 3, "batch", num_classes=5, input_shape=(3, 32, 32))
    assert [getattr(widens, name).conv.out_channels for name in widens.stage_names] == [4, 6, 8]
    assert Regressor(widens, (3, 32, 32), 7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(UserError, match=r"needs one options.width, or 3 of them; given: \[4, 6\]"):
        ConvNet([4, 6], 3)


def test_barlow_twins_asks_for_equal_views_and_unequal_features():
    z = torch.linalg.qr(draw(64, 9))[0]
    z = torch.linalg.qr(z - z.mean(0))[0]  # centred and decorrelated
    assert barlow_twins_loss(1e3 * z, 1e3 * z).item() == pytest.approx(0, abs=1e-3)
    same = draw(64, 1).expand(-1, 9)
    assert barlow_twins_loss(same, same, 1.0).item() == pytest.approx(9 * 8, rel=1e-3)


def test_a_run_learns_the_set_reports_scratch_beside_it_and_loads(tmp_path: Path):
    targets = [{"name": "digits", "size": 100, "test_size": 50}, {"name": "digits", "size": 50, "test_size": 50}]
    figures = execute(validate(tree(evaluate={**tree()["evaluate"], "targets": targets})), tmp_path / "run", cpu=True)
    made = load_product(tmp_path / "run")
    assert isinstance(made, RepresentationSet) and made.images.shape == (12, 1, 8, 8) and made.targets.shape == (12, 36)
    assert {"accuracy", "accuracy_digits0", "accuracy_scratch_digits1", "gain_over_scratch", "test_loss"} <= set(
        figures
    )
    execute(validate(tree(iterations=0)), tmp_path / "start", cpu=True)
    start = load_product(tmp_path / "start")
    assert (made.images - start.images).abs().max() > 1e-5 and (made.targets - start.targets).abs().max() > 1e-5
    assert (made.images - start.images).abs().max() < 6 * 1.5e-4  # six steps of AdamW at 1e-4


def test_a_run_that_was_cut_off_ends_with_the_same_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from stillhouse.methods.datasets.krr_st import method as krr_st

    execute(validate(tree()), tmp_path / "whole", cpu=True)
    calls, plain = [], krr_st.outer_loss

    def failing(*given, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*given, **options)

    monkeypatch.setattr(krr_st, "outer_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        execute(validate(tree()), tmp_path / "cut", cpu=True)
    monkeypatch.undo()
    execute(validate(tree()), tmp_path / "cut", cpu=True)
    whole, cut = load_product(tmp_path / "whole"), load_product(tmp_path / "cut")
    assert torch.equal(whole.images, cut.images) and torch.equal(whole.targets, cut.targets)


def test_fine_tuning_and_other_architectures_drop_the_head_of_the_regression(tmp_path: Path):
    other = {"model": "stillhouse:convnet1", "options": {"width": 3, "norm": "batch"}}
    spec = {**tree()["evaluate"], "probe": "finetune", "cross": [other]}
    figures = execute(validate(tree(iterations=0, evaluate=spec)), tmp_path / "run", cpu=True)
    assert 0 <= figures["accuracy_convnet1"] <= 1 and 0 <= figures["accuracy"] <= 1


def test_sets_that_do_not_fit_and_too_many_images_are_refused(tmp_path: Path):
    x, y = torch.zeros(2, 1, 4, 4), torch.zeros(2, 3)
    RepresentationSet(x, y, (0.0,), (1.0,)).save(tmp_path / "set")
    assert json.loads((tmp_path / "set" / "product.json").read_text())["kind"] == RepresentationSet.kind
    for images, targets, message in [(x, y[:1], "holds images"), (x / 0, y, "NaN"), (x, y.long(), "float32")]:
        with pytest.raises(UserError, match=message):
            RepresentationSet(images, targets, (0.0,), (1.0,))
    with pytest.raises(UserError, match="take fewer"):
        execute(validate(tree(images=500)), tmp_path / "run", cpu=True)
    with pytest.raises(UserError, match="set image_size: 8"):
        targets = [{"name": "digits", "image_size": 16}]
        execute(
            validate(tree(iterations=0, evaluate={**tree()["evaluate"], "targets": targets})),
            tmp_path / "other",
            cpu=True,
        )
