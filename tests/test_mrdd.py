"""MRDD: masks hide what they say, the bound of the information bounds it, c stays frozen, and the product is loaded and
judged."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.methods.pretraining.mrdd.evaluation import cluster_accuracy, redundancy
from stillhouse.methods.pretraining.mrdd.losses import (
    Estimator,
    estimator_loss,
    full_bound,
    kl_per_dimension,
    mask_image,
    sampled_bound,
    variational_loss,
)
from stillhouse.methods.pretraining.mrdd.networks import NetworkSpec, decoder, encoder
from stillhouse.methods.pretraining.mrdd.training import SpecificSpec, SpecificTraining
from stillhouse.methods.pretraining.mrdd.views import ViewMaker, edges
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load
from stillhouse.runs.recipe import validate
from stillhouse.runs.run import Run


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("patch", "ratio"), [(1, 0.5), (2, 0.7), (4, 0.75), (2, 0.0), (8, 0.9)])
def test_a_mask_hides_exactly_its_share_of_whole_patches_and_leaves_the_image_alone(patch: int, ratio: float):
    x = drawn(3, 1, 8, 8) + 10
    before, count = x.clone(), (8 // patch) ** 2
    masked, visible = mask_image(x, torch.rand(3, count), patch, ratio)
    assert torch.equal(x, before)
    hidden = (masked == 0).flatten(1).sum(1)
    assert hidden.tolist() == [int(ratio * count) * patch**2] * 3
    assert visible.shape == (3, count - int(ratio * count), patch**2)
    assert visible.sum().item() == pytest.approx(masked.sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "patch", "ratio", "says"),
    [((9, 8), 2, 0.5, "do not tile"), ((8, 8), 2, 1.0, "below 1"), ((8, 8), 2, -0.1, "below 1")],
)
def test_masks_that_do_not_fit_are_refused(shape: tuple[int, int], patch: int, ratio: float, says: str):
    with pytest.raises(UserError, match=says):
        mask_image(torch.zeros(2, 1, *shape), torch.rand(2, 16), patch, ratio)


def test_the_full_bound_is_the_mean_of_the_sampled_one_over_all_shifts():
    mean, log_variance, c = drawn(7, 3, seed=1), drawn(7, 3, seed=2).tanh(), drawn(7, 3, seed=3)
    shifts = [sampled_bound(mean, log_variance, c, (torch.arange(7) + k) % 7) for k in range(7)]
    assert full_bound(mean, log_variance, c).item() == pytest.approx(torch.stack(shifts).mean().item(), rel=1e-5)
    assert shifts[0].item() == 0
    with pytest.raises(UserError, match="at least two"):
        sampled_bound(mean[:1], log_variance[:1], c[:1], torch.tensor([0]))


def test_the_bound_is_above_the_information_of_gaussians_where_the_estimator_is_exact():
    noise, s = 0.8, drawn(20000, 1, seed=4)
    c = s + noise * drawn(20000, 1, seed=5)
    bound = full_bound(s, torch.full_like(s, 2 * math.log(noise)), c).item()
    information = 0.5 * math.log(1 + 1 / noise**2)
    assert information < bound == pytest.approx(1 / noise**2, rel=0.05)


def test_the_estimator_tells_related_codes_from_unrelated_ones():
    torch.manual_seed(0)
    s, unrelated = drawn(500, 4, seed=6), drawn(500, 2, seed=7)
    found = {}
    for name, c in (("related", s[:, :2].clone()), ("unrelated", unrelated)):
        q = Estimator(4, 2, 40)
        optimizer = torch.optim.Adam(q.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            estimator_loss(*q(s), c).backward()
            optimizer.step()
        found[name] = full_bound(*q(s), c).item()
    assert found["related"] > 1 > 0.5 > found["unrelated"] >= -0.1


def test_reconstruction_is_summed_as_published_or_averaged_over_the_batch():
    x, mean = [drawn(4, 1, 4, 4), drawn(4, 1, 4, 4, seed=1)], drawn(4, 3)
    rebuilt = [torch.zeros_like(v) for v in x]
    total, averaged = (variational_loss(x, rebuilt, mean, mean, kl_weight=0.5, reduction=r) for r in ("sum", "sample"))
    assert total["reconstruction"].item() == pytest.approx(4 * averaged["reconstruction"].item())
    assert (
        total["kl"].item()
        == pytest.approx(0.5 * kl_per_dimension(mean, mean).sum().item())
        == pytest.approx(averaged["kl"].item())
    )
    zero = torch.zeros(2, 3)
    assert kl_per_dimension(zero, zero).tolist() == [0, 0, 0]


def test_a_published_network_turns_32_pixels_into_512_features_and_back():
    spec = NetworkSpec()
    module, features = encoder(spec, (1, 32, 32))
    assert features == 512 and module(torch.zeros(2, 1, 32, 32)).shape == (2, 512)
    assert decoder(spec, 20, (1, 32, 32))(torch.zeros(2, 20)).shape == (2, 1, 32, 32)
    with pytest.raises(UserError, match="multiple of 4"):
        encoder(spec, (1, 10, 10))


def test_edges_are_dilation_minus_image_and_inputs_may_bring_their_own_views():
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 1
    ring = edges(x)[0, 0]
    assert ring.sum() == 8 and ring[2, 2] == 0
    assert [torch.equal(a, b) for a, b in zip(ViewMaker(("edge", "image"))(x), (edges(x), x))] == [True, True]
    restored = ViewMaker(("image", "edge"), (0.5,), (0.25,))((x - 0.5) / 0.25)[0]
    assert torch.allclose(restored, x)
    left, right = ViewMaker(("left", "right"))({"left": x, "right": 2 * x})
    assert torch.equal(right, 2 * left)
    for names, inputs, says in (
        (("image",), x, "at least two"),
        (("image", "egde"), x, "did you mean 'edge'"),
        (("left", "rigth"), {"left": x, "right": x}, "did you mean 'right'"),
        (("left", "right"), {"left": x, "right": x[:, :, :4]}, "one shape"),
    ):
        with pytest.raises(UserError, match=says):
            ViewMaker(names)(inputs)


def test_only_the_encoder_and_decoder_learn_from_the_bound_and_c_stays_what_it_was():
    from stillhouse.methods.pretraining.mrdd.networks import ConsistencyEncoder

    torch.manual_seed(0)
    network, shape = NetworkSpec(width=4, multipliers=[1, 2], latent_channels=2, blocks=1), (1, 8, 8)
    frozen, views = ConsistencyEncoder(network, 2, shape, 3), ViewMaker(("image", "edge"))
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    module = SpecificTraining(SpecificSpec(dim=4), network, views, 0, shape, frozen, 3, "sample")
    module.train()
    batch = {"input": torch.rand(6, 1, 8, 8)}
    module(batch, None)["loss"].backward()  # type: ignore[arg-type]
    assert all(p.grad is None for p in module.estimator.parameters())
    assert all(p.grad is not None for p in [*module.student.parameters(), *module.decoder.parameters()])
    weights = module.estimator.p_mu[0].weight.clone()
    module.after_step(batch, None, True)  # type: ignore[arg-type]
    assert not torch.equal(weights, module.estimator.p_mu[0].weight)
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())


def test_clusters_are_matched_to_classes_one_to_one():
    labels = np.array([0, 0, 1, 1, 2, 2])
    assert cluster_accuracy(labels, np.array([2, 2, 0, 0, 1, 1])) == 1
    assert cluster_accuracy(labels, np.zeros(6, dtype=int)) == pytest.approx(1 / 3)


def test_redundancy_is_one_for_a_function_of_s_and_none_for_noise():
    g = np.random.default_rng(0)
    s, t = g.normal(size=(400, 3)), g.normal(size=(200, 3))
    copied, noise = (
        redundancy(s, s[:, :2], t, t[:, :2]),
        redundancy(s, g.normal(size=(400, 2)), t, g.normal(size=(200, 2))),
    )
    assert min(copied.values()) > 0.9 and noise["redundancy_linear"] < 0.05
    bent = redundancy(s, s[:, :1] ** 2, t, t[:, :1] ** 2)
    assert bent["redundancy_linear"] < 0.1 < 0.6 < bent["redundancy_kernel"]


def recipe(**changes: object) -> dict:
    quick = {"epochs": 3, "batch_size": 50, "optimizer": {"name": "adamw", "lr": 2e-3, "weight_decay": 1e-4}}
    return {
        "method": "mrdd",
        "data": {"name": "digits", "size": 300, "test_size": 100, "augment": "plain"},
        "network": {"kind": "dense", "hidden": [64]},
        "consistency": {"dim": 4, "mask_ratio": 0.25, "train": quick},
        "specific": {"dim": 5, "train": quick},
        **changes,
    }


def test_a_run_leaves_encoders_that_load_and_give_the_same_codes(tmp_path: Path):
    config = validate(recipe())
    figures = execute(config, tmp_path / "run", cpu=True)
    assert figures["accuracy"] > 0.3 and {"nmi_c", "ari_s", "cluster_acc", "redundancy_kernel", "error_edge"} <= set(
        figures
    )
    product = load(tmp_path / "run")
    again = load(tmp_path / "run" / "product")
    run = Run(tmp_path, config, cpu=True)
    batch = next(iter(run.loader(config.data, "train", 300)))["input"]
    c, s = product.codes(batch)
    assert product(batch).shape == (300, 9) and torch.equal(product(batch), again(batch))
    assert c.mean(0).abs().max() < 1e-4 and torch.allclose(c.std(0, unbiased=False), torch.ones(4), atol=1e-3)
    assert len(s) == 2 and torch.equal(product(batch)[:, 4:], s[0])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"best": 2}, "below the number of views"),
        ({"views": ["image", "image"]}, "once each"),
        ({"views": ["image", "edges"]}, "did you mean 'edge'"),
        ({"consistency": {"patch": 3}}, "do not tile"),
        ({"network": {"multipliers": [1, 2, 2, 2, 2]}}, "multiple of 16"),
    ],
)
def test_recipes_that_cannot_work_are_refused_before_training(tmp_path: Path, changes: dict, says: str):
    with pytest.raises(UserError, match=says):
        execute(validate(recipe(**changes)), tmp_path / "run", cpu=True)
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_the_estimators_optimizer_is_part_of_the_checkpoint():
    from stillhouse.methods.pretraining.mrdd.networks import ConsistencyEncoder

    network, shape, views = NetworkSpec(kind="dense", hidden=[8]), (1, 8, 8), ViewMaker(("image", "edge"))
    torch.manual_seed(0)
    frozen = ConsistencyEncoder(network, 2, shape, 3)
    whole, second = (
        SpecificTraining(SpecificSpec(dim=4), network, views, 0, shape, frozen, 3, "sample") for _ in range(2)
    )
    batch = {"input": torch.rand(6, 1, 8, 8)}
    for i in range(2):
        for module in (whole, second)[: i + 1]:
            torch.manual_seed(i)
            module(batch, None)  # type: ignore[arg-type]
            module.after_step(batch, None, True)  # type: ignore[arg-type]
        if i == 0:
            second.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert torch.equal(whole.estimator.p_mu[0].weight, second.estimator.p_mu[0].weight)
