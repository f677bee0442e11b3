"""The judge of synthetic sets: training protocols, continual learning, architecture search, scores over rates, and
trainings that a product brings."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.evaluation.statistics import rank_correlation
from stillhouse.runs.execution import execute, plan
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate
from stillhouse.runs.run import Run
from stillhouse.synthetic.config import AugmentSpec, EvaluateSpec
from stillhouse.synthetic.judging.evaluator import judge
from stillhouse.synthetic.judging.protocol import Judging, renumbered
from stillhouse.synthetic.training import HardTraining, SoftTraining

PLAIN = AugmentSpec(groups="")
TWO = {"width": [2, 4], "pool": ["avg", "max"]}


def tree(evaluate: dict[str, Any], **given: Any) -> dict[str, Any]:
    return {
        "method": "selection",
        "data": {"name": "digits", "augment": "plain", "size": 200, "test_size": 100},
        "network": {"model": "stillhouse:convnet2", "options": {"width": 4}},
        "augment": {"groups": "crop_scale"},
        "evaluate": {"networks": 1, "epochs": 2, "full_epochs": 1, **evaluate},
        **given,
    }


def judged(folder: Path, evaluate: dict[str, Any], **given: Any) -> dict[str, float]:
    return execute(validate(tree(evaluate, **given)), folder, cpu=True)


def hard(spec: EvaluateSpec, images: Tensor, labels: Tensor) -> HardTraining:
    return HardTraining.of(images, labels, spec, PLAIN, None, ("test",))


# ---- protocols -------------------------------------------------------------------------------------------------------


class Shares(nn.Module):
    """Logits are the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.mean((2, 3)).detach()
        return self.scale * x.mean((2, 3))


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_a_mixed_image_costs_each_label_by_its_share(mix: str):
    labels = torch.arange(5).repeat(4)
    images = F.one_hot(labels).float()[:, :, None, None].expand(-1, -1, 8, 8).contiguous()  # of class c, channel c is 1
    network = Shares()
    mixed = []
    for i in range(8):
        loss = hard(EvaluateSpec(**{mix: 1.0}), images, labels).loss(network, i)
        assert torch.allclose(
            loss, F.cross_entropy(network.seen, network.seen), atol=1e-5
        )  # the shares of an image's classes are its logits
        mixed.append(bool((network.seen.amax(1) < 1).any()))
    assert any(mixed)


def test_as_many_batches_are_mixed_as_asked_for():
    images, labels = torch.arange(6.0)[:, None, None, None].expand(-1, 6, 4, 4).contiguous(), torch.arange(6)
    training, network, mixed = hard(EvaluateSpec(mixup=1.0, mix_probability=0.5), images, labels), Shares(), 0
    for i in range(60):
        training.loss(network, i)
        mixed += int((network.seen - network.seen.round()).abs().max() > 1e-3)
    assert 15 < mixed < 45


def test_the_rate_falls_as_the_protocol_says_and_by_default_once_with_a_new_momentum():
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4) % 3
    steps = EvaluateSpec(
        epochs=10, lr=0.1, optimizer="adamw", schedule={"name": "step", "milestones": [2, 4], "gamma": 0.5}
    )
    plain, stepped = hard(EvaluateSpec(epochs=10, lr=0.1), images, labels), hard(steps, images, labels)
    assert [stepped.rate(e) for e in (0, 1, 2, 3, 4, 9)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert [plain.rate(e) for e in (0, 6, 7, 9)] == [1, 1, 0.1, 0.1]
    network = Shares()
    assert isinstance(stepped.new_optimizer(network), torch.optim.AdamW)
    sgd = plain.new_optimizer(network)
    for i in range(8):
        before = network.scale.detach().clone()
        plain.step(network, sgd, i)
    assert torch.allclose(
        sgd.state[network.scale]["momentum_buffer"] * -0.01, network.scale.detach() - before, rtol=1e-3
    )  # of epoch 7 alone
    assert sgd.state[network.scale]["momentum_buffer"].abs() < 1


def test_the_best_epoch_is_told_beside_the_last(tmp_path: Path):
    found = judged(tmp_path / "run", {"networks": 2, "epochs": 6, "lr": 0.5, "best_every": 1})
    assert found["accuracy_best"] >= found["accuracy"] and "accuracy_best_std" in found


def test_other_architectures_have_a_mean_and_a_spread_each(tmp_path: Path):
    cross = [{"model": "stillhouse:mlp", "options": {"widths": [w]}} for w in (4, 8)] + ["stillhouse:convnet2"]
    found = judged(tmp_path / "run", {"cross": cross, "cross_networks": 2})
    assert {
        "accuracy_mlp_1",
        "accuracy_mlp_1_std",
        "accuracy_mlp_2",
        "accuracy_convnet2",
        "accuracy_convnet2_std",
    } <= set(found)


def test_scores_take_the_best_of_the_rates_for_every_network(tmp_path: Path):
    rates = [0.001, 0.01, 0.2]
    one = {r: judged(tmp_path / f"{r}", {"epochs": 5, "lr": r})["accuracy"] for r in rates}
    found = judged(tmp_path / "tried", {"epochs": 5, "lr": 0.01, "scores": True, "rates": rates})
    assert found["accuracy"] == one[0.01] and found["accuracy_tried"] == max(one.values())
    assert found["ior"] == pytest.approx(found["accuracy_tried"] - found["accuracy_random"])
    assert found["hlr"] == pytest.approx(found["accuracy_full"] - found["accuracy_tried"])


# ---- a product's own training ----------------------------------------------------------------------------------------


def test_a_product_brings_its_own_training_with_soft_labels_and_only_those(tmp_path: Path):
    config = validate(tree({"protocol": "soft", "epochs": 60, "lr": 0.02}))
    judged(tmp_path / "run", {})
    made = load_product(tmp_path / "run")
    made.soft = 20 * F.one_hot(made.labels, 10).float()
    run = Run(tmp_path / "judge", config, cpu=True)
    learned = judge(made, run)["accuracy"]
    still = judge(made, run, lambda plain: replace(plain, lr=1e-9))["accuracy"]
    assert learned > still + 0.1
    hard_run = Run(
        tmp_path / "hard", config.model_copy(update={"evaluate": EvaluateSpec(networks=1, epochs=2)}), cpu=True
    )
    assert judge(made, hard_run) == judge(made, hard_run, lambda plain: replace(plain, lr=1e-9))


def test_soft_labels_of_images_may_be_mixed_and_those_of_views_not(tmp_path: Path):
    judged(tmp_path / "run", {})
    made = load_product(tmp_path / "run")
    made.soft = torch.randn(10, 10)
    spec = EvaluateSpec(protocol="soft", cutmix=1.0, batch_size=5)
    training = SoftTraining.of(made, spec, PLAIN, torch.device("cpu"), ("test",))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert training.steps_per_epoch == 2 and training.loss(network, 0).isfinite()
    made.soft, made.views = None, object()  # type: ignore[assignment]
    with pytest.raises(UserError, match="cannot mix views"):
        SoftTraining.of(made, spec, PLAIN, torch.device("cpu"), ("test",))


# ---- continual learning ----------------------------------------------------------------------------------------------


def test_beside_soft_labels_the_hard_protocol_keeps_its_own_optimizer(tmp_path: Path):
    soft = {
        "protocol": "soft",
        "optimizer": "adam",
        "lr": 1e-4,
        "weight_decay": 0.3,
        "schedule": {"name": "cosine"},
        "batch_size": 7,
    }
    relabel = {
        "teacher": {"model": "stillhouse:convnet2", "options": {"width": 4, "norm": "batch"}, "train": {"epochs": 1}},
        "recover": None,
    }
    config = validate(tree(soft, method="sre2l", **relabel))
    run = Run(tmp_path / "run", config, cpu=True)
    execute(config, tmp_path / "run", cpu=True)
    judging = Judging(load_product(tmp_path / "run"), run)
    for learns in (judging.hard_labels(PLAIN), judging.all_real()):
        made = learns(config.evaluate, 0)
        assert (made.optimizer, made.lr, made.weight_decay, made.schedule, made.batch_size > 7) == (
            "sgd",
            0.01,
            5e-4,
            None,
            True,
        )


def test_classes_are_renumbered_in_the_order_they_came():
    assert renumbered(torch.tensor([0, 1, 2, 3, 3]), [3, 0], 4).tolist() == [1, -1, -1, 0, 0]


def test_continual_learning_tells_every_step_and_their_mean_and_each_seed_has_an_order(tmp_path: Path):
    given = {"evaluate": {"epochs": 40, "continual": {"steps": 5}}, "ipc": 5}
    found = judged(tmp_path / "a", **given)
    steps = [found[f"continual_step{i}"] for i in range(1, 6)]
    assert found["continual_accuracy"] == pytest.approx(sum(steps) / 5)
    assert steps[0] > 0.6 > steps[-1]  # two classes are easier than ten
    assert all(
        math.isclose(a * n % 1, 0, abs_tol=1e-6) or math.isclose(a * n % 1, 1, abs_tol=1e-6)
        for a, n in zip(steps, range(20, 101, 20))
    )
    other = judged(tmp_path / "b", **given, seed=1)
    assert [other[f"continual_step{i}"] for i in range(1, 6)] != steps


def test_a_step_a_class_begins_with_what_is_always_right(tmp_path: Path):
    assert judged(tmp_path / "ten", {"continual": {"steps": 10}})["continual_step1"] == 1.0


# ---- architecture search ---------------------------------------------------------------------------------------------


def test_a_search_names_its_choice_and_what_that_is_worth(tmp_path: Path):
    found = judged(tmp_path / "run", {"search": {"grid": TWO}})
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    table = record["search"]
    assert found["search_candidates"] == len(table) == 4
    chosen = max(table, key=lambda row: row["proxy"])
    assert record["search_choice"] == {k: chosen[k] for k in TWO} and found["search_accuracy"] == chosen["full"]
    assert found["search_best"] == max(row["full"] for row in table) >= found["search_mean"]
    assert found["search_spearman"] == pytest.approx(
        rank_correlation([r["proxy"] for r in table], [r["full"] for r in table])
    )
    assert found["search_full_seconds"] > 0 and found["search_seconds"] > 0


def test_training_on_all_data_is_shared_between_methods_and_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))

    def kept() -> tuple[int, int]:
        names = [p.name for p in (tmp_path / "cache" / "stages").iterdir() if p.is_dir()]
        return sum(n.startswith("evaluate.full") for n in names), sum(n.startswith("evaluate.proxy") for n in names)

    judged(tmp_path / "one", {"search": {"grid": TWO}})
    assert kept() == (4, 4)
    judged(tmp_path / "two", {"search": {"grid": TWO}}, method="dm", iterations=1, batch_real=5, seed=3)
    assert kept() == (4, 8)


def test_proxies_choose_by_validation_data_where_there_is_some(tmp_path: Path):
    judged(
        tmp_path / "run",
        {"search": {"grid": TWO}},
        data={"name": "digits", "augment": "plain", "size": 200, "val": 0.2, "test_size": 33},
    )
    table = json.loads((tmp_path / "run" / "environment.json").read_text())["search"]
    assert all(abs(row["proxy"] * 40 - round(row["proxy"] * 40)) < 1e-6 for row in table)  # 40 validation samples
    assert all(abs(row["full"] * 33 - round(row["full"] * 33)) < 1e-6 for row in table)


def test_ranks_agree_or_not_whatever_the_values():
    assert rank_correlation([1, 2, 3, 4], [0.1, 0.2, 5, 60]) == 1 and rank_correlation([1, 2, 3], [3, 2, 1]) == -1
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ({"search": {"grid": {"widht": [2]}}}, "widht"),
        ({"search": {"grid": {"depth": [1, 9]}}}, "too deep"),
        ({"search": {"grid": {"width": []}}}, "width"),
        ({"protocol": "soft", "continual": {}}, "take protocol hard"),
        ({"rates": [0.1]}, "set scores to true"),
        ({"optimizer": "adamm"}, "adamw"),
        ({"continual": {"steps": 11}}, "steps is 11, but there are 10 classes"),
        ({"cross": ["stillhouse:convnett"]}, "convnett"),
    ],
)
def test_mistakes_are_answered_in_a_sentence_before_anything_is_learned(evaluate: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        plan(validate(tree(evaluate)))
