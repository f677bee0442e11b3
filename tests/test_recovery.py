"""What SRe2L and its kin share: descents along a cosine that a second start does not repeat, one draw a batch, and real
images read only when asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stillhouse import catalog
from stillhouse.randomness import generator
from stillhouse.runs.execution import execute
from stillhouse.runs.recipe import validate
from stillhouse.runs.run import Run
from stillhouse.synthetic.descent import Cost, batch_view, descend
from stillhouse.synthetic.real import RealImages, RealRows

DIGITS = {
    "data": {"name": "digits", "augment": "plain", "size": 200, "test_size": 100},
    "network": {"model": "stillhouse:convnet2", "options": {"width": 4}},
    "teacher": {
        "model": "stillhouse:convnet2",
        "options": {"width": 4, "norm": "batch"},
        "train": {"epochs": 1, "batch_size": 50},
    },
    "ipc": 2,
    "evaluate": {"protocol": "soft", "networks": 1, "epochs": 1},
}
CONFIG = validate({**DIGITS, "method": "sre2l"})


def test_the_rate_falls_along_a_cosine_and_what_follows_a_step_is_done(tmp_path: Path):
    x, seen = nn.Parameter(torch.zeros(1, 1, 2, 2)), []
    cost = descend(
        Run(tmp_path, CONFIG, cpu=True),
        "plain",
        x,
        0.5,
        4,
        lambda i: {"loss": x.sum()},
        plain=True,
        after=lambda: seen.append(float(x.detach()[0, 0, 0, 0])),
    )
    assert seen == pytest.approx([-0.5, -0.9268, -1.1768, -1.25], abs=1e-4)
    assert cost.iterations == 4 and cost.seconds > 0 and cost.peak >= 0
    assert descend(Run(tmp_path, CONFIG, cpu=True), "none", x, 0.5, 0, lambda i: {"loss": x.sum()}) == Cost()


def test_a_descent_that_is_done_is_not_repeated(tmp_path: Path):
    def once(x: nn.Parameter, calls: list[int]) -> Cost:
        def loss(i: int) -> dict[str, Tensor]:
            calls.append(i)
            return {"loss": (x * torch.randn_like(x)).square().sum()}

        return descend(Run(tmp_path, CONFIG, cpu=True), "once", x, 0.1, 3, loss)

    first, again, calls = nn.Parameter(torch.ones(2, 1, 4, 4)), nn.Parameter(torch.zeros(2, 1, 4, 4)), []
    costs = [once(first, calls), once(again, calls)]
    assert calls == [0, 1, 2] and torch.equal(first, again) and costs[0] == costs[1] and costs[0].peak > 0


def test_costs_add_up_and_the_largest_iteration_counts():
    figures = (Cost(2.0, 10, 3_000_000) + Cost(1.0, 5, 1_000_000)).figures()
    assert figures == {
        "distil_seconds": 3,
        "distil_iterations": 15,
        "distil_peak_mb": 3,
        "distil_seconds_per_iteration": 0.2,
    }
    assert "distil_seconds_per_iteration" not in Cost().figures()


def test_a_batch_is_seen_under_one_draw():
    one = torch.randn(1, 3, 16, 16)
    views = [batch_view(one.expand(5, -1, -1, -1), "resized_crop_flip", 4, generator("view", i)) for i in range(4)]
    assert all(torch.equal(view, view[:1].expand_as(view)) for view in views)
    assert not torch.equal(views[0], views[1]) and not torch.equal(views[0], one.expand_as(views[0]))
    assert torch.equal(batch_view(one, "", 0, generator("view")), one)


def test_a_draw_reads_no_image_but_its_own():
    asked: list[int] = []

    def read(rows: Tensor) -> Tensor:
        asked.extend(rows.tolist())
        return torch.zeros(len(rows), 1, 4, 4)

    split = RealRows(read, torch.arange(60) % 3, ["a", "b", "c"], (0.5,), (0.5,), (1, 4, 4))
    assert split.draw(4, generator("draw")).shape == (12, 1, 4, 4)
    assert len(asked) == 12 and [row % 3 for row in asked] == [0] * 4 + [1] * 4 + [2] * 4


def test_images_read_when_asked_for_are_those_in_memory(tmp_path: Path):
    run = Run(tmp_path, CONFIG, cpu=True)
    rows, images = RealRows.of(run, CONFIG.data), RealImages.load(run, CONFIG.data)
    assert images.images.shape == (200, 1, 8, 8) and torch.equal(
        rows.draw(3, generator("draw")), images.draw(3, generator("draw"))
    )
    assert torch.equal(rows.labels, images.labels) and rows.shape == images.shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("method", "given", "steps"),
    [
        ("sre2l", {"recover": {"iterations": 3, "jitter": 1, "augment": "resized_crop"}, "relabel": {"epochs": 1}}, 6),
        ("infer", {"compensate": {"iterations": 3, "jitter": 1}, "views": {"augment": "crop", "mix": "none"}}, 3),
        ("nrr_dd", {"refine": {"iterations": 3, "jitter": 1}, "relabel": {"epochs": 1}}, 6),
    ],
)
@pytest.mark.filterwarnings("ignore:Class")  # a network of one epoch is seldom right
def test_a_run_tells_what_its_descents_cost(method: str, given: dict, steps: int, tmp_path: Path):
    tree = {**DIGITS, "method": method, **given}
    if method == "infer":
        tree["teachers"] = [tree.pop("teacher")]
    found = execute(validate(tree), tmp_path / "run", cpu=True)
    assert found["distil_iterations"] == steps and found["distil_peak_mb"] > 0
    assert found["distil_seconds_per_iteration"] == pytest.approx(found["distil_seconds"] / steps)


@pytest.mark.parametrize(
    ("method", "stage", "options"),
    [
        ("nrr_dd", "refine", {"relabel": {"epochs": 1}, "refine": {"alpha_bn": 0}}),
        ("cv_dd", "recover", {"priors": [1], "voters": 1, "relabel": {"epochs": 1}, "recover": {"r_bn": 0, "area": 1}}),
        ("sre2l", "recover", {"relabel": {"epochs": 1}, "recover": {"r_bn": 0}}),
    ],
)
def test_classes_are_recovered_a_few_at_a_time(method: str, stage: str, options: dict, tmp_path: Path):
    tree = {**DIGITS, "method": method, "ipc": 1, **options}
    if method == "cv_dd":
        tree["committee"] = [tree.pop("teacher")]
    batch, found = {"iterations": 4, "jitter": 0, "augment": "", "lr": 0.01}, {}
    for most in (None, 4):
        config = validate({**tree, stage: {**options[stage], **batch, "classes": most}})
        run = Run(tmp_path / str(most), config, cpu=True)
        found[most] = catalog.method(method).run(config, run)
    whole, parts = found[None].images, found[4].images
    assert whole.shape == parts.shape == (10, 1, 8, 8)
    if method != "sre2l":  # whose noise is drawn for each descent
        torch.testing.assert_close(parts, whole, atol=1e-3, rtol=0)  # each image has its own loss, and Adam no scale
    assert (tmp_path / "4" / "checkpoints").is_dir()
