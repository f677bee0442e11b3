"""NCFM: characteristic functions see what means do not, the sampler climbs, and a run that was cut off goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.functional.matching import feature_mean_distance
from stillhouse.methods.datasets.ncfm import (
    SamplingNetwork,
    between,
    characteristic_distance,
    characteristic_terms,
    corrected_logits,
)
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate
from stillhouse.synthetic.training import HardTraining
from stillhouse.training.loop import Loop

DIGITS = {
    "method": "ncfm",
    "data": {"name": "digits", "augment": "plain", "size": 200, "test_size": 100},
    "network": {"model": "stillhouse:convnet2", "options": {"width": 4}},
    "augment": {"always": "crop_scale", "groups": ""},
    "pool": {"count": 2, "epochs": 1, "batch_size": 100},
    "batch_real": 5,
    "frequencies": 8,
    "iterations": 2,
    "evaluate": {"networks": 1, "epochs": 2},
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_amplitude_and_phase_sum_to_the_squared_difference_of_the_characteristic_functions():
    real, synthetic, t = normal(20, 4), normal(5, 4, seed=1), normal(16, 4, seed=2)
    amplitude, phase = characteristic_terms(real, synthetic, t)
    left, right = (torch.exp(1j * (x @ t.T)).mean(0) for x in (real, synthetic))
    assert torch.allclose(amplitude + phase, (left - right).abs().square(), atol=1e-6)
    halves = characteristic_distance(real, synthetic, t, unit_features=False)
    assert torch.allclose(halves, (left - right).abs().mean() / 2**0.5, atol=1e-6)


def test_the_distance_is_symmetric_and_blind_to_order_and_to_the_scale_of_features():
    real, synthetic, t = normal(20, 4), normal(5, 4, seed=1), normal(16, 4, seed=2)
    value = characteristic_distance(real, synthetic, t)
    assert torch.allclose(value, characteristic_distance(synthetic, real, t), atol=1e-6)
    assert torch.allclose(value, characteristic_distance(real.flip(0), 3 * synthetic.flip(0), t), atol=1e-6)


def test_equal_sets_are_at_the_floor():
    x, t = normal(12, 4).double(), normal(16, 4, seed=2).double()
    assert 300 * characteristic_distance(x, x, t).item() == pytest.approx(300 * (0.5 * 1e-12) ** 0.5)


def test_sets_of_one_mean_and_two_spreads_differ_though_their_means_do_not():
    narrow, wide, t = torch.tensor([[-1.0], [1.0]]), torch.tensor([[-2.0], [2.0]]), normal(64, 1)
    assert feature_mean_distance(narrow, wide, 1) == 0
    assert characteristic_distance(narrow, wide, t, unit_features=False) > 0.1


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_gradients_are_finite_for_equal_sets_and_at_frequency_zero(alpha: float, beta: float):
    real = normal(6, 4)
    synthetic, t = real.clone().requires_grad_(), torch.cat([torch.zeros(1, 4), normal(3, 4, seed=1)])
    characteristic_distance(real, synthetic, t, alpha, beta).backward()
    assert synthetic.grad.isfinite().all()


def test_a_characteristic_function_of_zero_gives_no_nan():
    synthetic = torch.tensor([[0.0], [torch.pi]], requires_grad=True)  # exp(0) + exp(i pi) = 0
    characteristic_distance(torch.zeros(2, 1), synthetic, torch.ones(1, 1), unit_features=False).backward()
    assert synthetic.grad.isfinite().all()


def test_half_precision_features_are_compared_in_float32():
    value = characteristic_distance(normal(8, 4).bfloat16(), normal(4, 4, seed=1).bfloat16(), normal(16, 4, seed=2))
    assert value.dtype == torch.float32 and value.isfinite()


def test_a_sampler_that_ascends_finds_frequencies_of_greater_distance():
    torch.manual_seed(0)
    sampler, noise = SamplingNetwork(4), normal(64, 4)
    real, synthetic = normal(30, 4), normal(5, 4, seed=1) + 1
    climber = torch.optim.SGD(sampler.parameters(), 1e-2, momentum=0.5, maximize=True)
    values = []
    for _ in range(30):
        climber.zero_grad()
        value = 300 * characteristic_distance(real, synthetic, sampler(noise))
        value.backward()
        climber.step()
        values.append(value.item())
    assert values[-1] > values[0] + 5
    assert sampler(noise).abs().max() < 1


def test_a_point_between_is_at_its_ends_a_start_and_a_trained_network():
    start, end = normal(5), normal(5, seed=1)
    assert torch.equal(between(start, end, 1.0), start) and torch.equal(between(start, end, 0.0), end)


def test_labels_of_images_that_the_teacher_gets_wrong_are_one_hot():
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0]])
    assert corrected_logits(logits, torch.tensor([0, 1])).tolist() == [[3.0, 1.0], [0.0, 1.0]]


def test_a_stored_image_is_four_training_images_and_stays_a_picture(tmp_path: Path):
    execute(validate({**DIGITS, "soft_labels": True, "lr": 0.5}), tmp_path / "run", cpu=True)
    made = load_product(tmp_path / "run")
    assert made.images.shape == (10, 1, 8, 8) and made.training_images()[0].shape == (40, 1, 8, 8)
    assert made.bounded and made.pixels().min() >= -1e-3 and made.pixels().max() <= 1 + 1e-3
    assert made.soft.shape == (40, 10)
    soft = {**DIGITS, "evaluate": {"protocol": "soft", "networks": 1, "epochs": 2}}
    assert 0 <= execute(validate({**soft, "soft_labels": True}), tmp_path / "soft", cpu=True)["accuracy"] <= 1
    with pytest.raises(UserError, match="hard labels"):
        validate(soft)


@pytest.mark.parametrize(
    "options", [{"sampler": "learned"}, {"optimiser": "sgd", "lr": 0.1}, {"calibration": 0, "fixed_real": True}]
)
def test_every_option_moves_the_images(options: dict, tmp_path: Path):
    made = []
    for name, iterations in (("begun", 0), ("learned", 1)):
        execute(validate({**DIGITS, **options, "iterations": iterations}), tmp_path / name, cpu=True)
        made.append(load_product(tmp_path / name).images)
    assert made[1].isfinite().all() and (made[0] - made[1]).flatten(1).abs().amax(1).min() > 0  # every image


def test_the_paper_variant_judges_by_the_published_protocol():
    config: Any = recipe.load(Path(__file__).parents[1] / "recipes/datasets/ncfm.yaml", "paper")
    spec, images = config.evaluate, normal(256, 3, 8, 8)
    training = HardTraining.of(images, torch.arange(256) % 10, spec, spec.augment, None, ("test",))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    assert isinstance(training.new_optimizer(network), torch.optim.AdamW) and training.steps_per_epoch == 2
    assert [training.lr * training.rate(e) for e in (0, 399, 400, 1600, 1999)] == pytest.approx(
        [1e-3, 1e-3, 5e-4, 6.25e-5, 6.25e-5]
    )
    assert (training.epochs, training.cutmix, training.mix_probability, training.align_corners, spec.best_every) == (
        2000,
        1,
        0.5,
        False,
        100,
    )
    assert training.step(network, training.new_optimizer(network), 0).isfinite()


def test_a_run_that_was_cut_off_within_an_iteration_goes_on_to_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = {**DIGITS, "sampler": "learned", "iterations": 2}
    execute(validate(given), tmp_path / "whole", cpu=True)
    collect = Loop._collect

    def cut(self: Loop, i: int, terms: dict) -> None:
        collect(self, i, terms)
        if self.stage == "ncfm" and i == 26:
            self._interrupted = True

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_collect", cut)
        with pytest.raises(KeyboardInterrupt):
            execute(validate(given), tmp_path / "cut", cpu=True)
    execute(validate(given), tmp_path / "cut", cpu=True)
    assert torch.equal(load_product(tmp_path / "whole").images, load_product(tmp_path / "cut").images)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 0, "beta": 0}, "nothing is matched"),
        ({"network": {"model": "stillhouse:convnet2", "options": {"width": 4, "norm": "batch"}}}, "buffers"),
        ({"network": {"model": "stillhouse:mlp"}}, "embed"),
        ({"factor": 9}, "cut into 9 x 9"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(options: dict, words: str, tmp_path: Path):
    with pytest.raises(UserError, match=words):
        execute(validate({**DIGITS, **options}), tmp_path / "run", cpu=True)


def test_features_and_frequencies_of_other_sizes_are_refused():
    with pytest.raises(UserError, match="frequencies"):
        characteristic_distance(normal(3, 4), normal(3, 4), normal(8, 5))
