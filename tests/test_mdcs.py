"""MDCS: what each expert favours, what teaches what, networks of other libraries, and a product that loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.methods.classification.mdcs import (
    MDCS,
    Experts,
    confident,
    consistency_loss,
    diversity_loss,
    log_priors,
)
from stillhouse.models import build
from stillhouse.models.convnet import ConvNet
from stillhouse.models.resnet import ResNet
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.training.context import Progress

SHAPE = (1, 8, 8)
RECIPE = Path(__file__).parents[1] / "recipes" / "classification" / "mdcs.yaml"


def nets(number: int = 3) -> list[nn.Module]:
    return [ResNet(4, (4, 6), (1, 1), num_classes=4, input_shape=SHAPE, shortcut="pad") for _ in range(number)]


def experts() -> Experts:
    torch.manual_seed(0)
    return Experts(nets(), "layer2", torch.zeros(1, *SHAPE))


def batch(n: int = 6) -> dict:
    draw = torch.Generator().manual_seed(1)
    weak, strong = (torch.randn(n, *SHAPE, generator=draw) for _ in range(2))
    return {"input": weak, "views": {"strong": strong}, "label": torch.arange(n) % 4}


COUNTS = torch.tensor([500, 100, 20, 4])


def test_logits_that_fit_the_data_move_towards_the_tail_with_the_exponent() -> None:
    """Where adjusted logits are the data's log frequencies, raw ones favour the head below 1, and the tail above."""
    frequencies = COUNTS.double().log().float()
    for exponent, best in ((-0.5, 0), (0.0, 0), (2.5, 3)):
        raw = frequencies - log_priors(COUNTS, [exponent])[0]
        assert int(raw.argmax()) == best
    assert (frequencies - log_priors(COUNTS, [1.0])[0]).std() < 1e-6


def test_counts_may_be_large_but_not_zero() -> None:
    large = log_priors(torch.tensor([10**9, 1]), [2.5])
    assert large.isfinite().all() and large[0, 1] == 0
    with pytest.raises(UserError, match="class 1 has no training samples"):
        log_priors(torch.tensor([3, 0]), [1.0])


def test_the_weak_view_teaches_and_only_where_it_is_right() -> None:
    draw = torch.Generator().manual_seed(0)
    weak, strong = (torch.randn(2, 5, 4, generator=draw).requires_grad_() for _ in range(2))
    targets = torch.arange(5) % 4
    chosen = confident(weak, targets)
    consistency_loss(weak, strong, chosen).backward()
    assert weak.grad is None
    assert torch.equal(strong.grad.abs().sum(-1) > 0, chosen)
    by_hand = torch.zeros(())
    for e in range(2):
        rows = F.kl_div(strong[e].log_softmax(-1), weak[e].log_softmax(-1), reduction="none", log_target=True).sum(-1)
        by_hand = by_hand + (rows[chosen[e]].mean() if chosen[e].any() else 0)
    torch.testing.assert_close(consistency_loss(weak, strong, chosen), by_hand.detach(), check_stride=False)


def test_no_right_sample_costs_nothing() -> None:
    logits = torch.randn(3, 4, 2, requires_grad=True)
    loss = consistency_loss(logits.detach(), logits, torch.zeros(3, 4, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and logits.grad.isfinite().all()


def test_both_views_are_classified() -> None:
    logits, targets = torch.randn(3, 6, 4), torch.arange(6) % 4
    rows = [F.cross_entropy(z, targets) for z in logits]
    torch.testing.assert_close(diversity_loss(logits, targets), sum(rows, torch.zeros(())))


@pytest.mark.parametrize(("epoch", "share"), [(0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)])
def test_consistency_rises_over_its_first_epochs(epoch: int, share: float) -> None:
    module = MDCS(experts(), COUNTS, weight=0.6, warmup=4, select=False)
    terms = module(batch(), Progress(epoch=epoch))
    torch.testing.assert_close(terms["loss"], terms["diversity"] + 0.6 * share * terms["consistency"])
    alone = MDCS(experts(), COUNTS, weight=0.0)(batch(), Progress(epoch=epoch))
    torch.testing.assert_close(alone["loss"], terms["diversity"])


def test_experts_share_the_stem_and_predict_with_raw_logits() -> None:
    made, x = experts().eval(), batch()["input"]
    assert [n for n, _ in made.shared.named_children()] == ["conv1", "bn1", "relu", "layer1"]
    ours = made.by_expert(x)
    torch.testing.assert_close(made(x), ours.mean(0))
    assert not torch.allclose(ours[0], ours[1]) and ours.abs().max() <= 30.0001
    made.heads[0].weight.data *= 7  # a cosine classifier
    torch.testing.assert_close(made.by_expert(x)[0], ours[0])


def test_the_shared_part_may_learn_more_slowly() -> None:
    made = experts()
    own, shared = MDCS(made, COUNTS, shared_lr=0.01).param_groups()
    assert shared["lr"] == 0.01 and "lr" not in own
    assert len(own["params"]) + len(shared["params"]) == len(list(made.parameters()))


@pytest.mark.parametrize(("name", "branch"), [("timm:resnet10t", "layer3"), ("torchvision:resnet18", "layer4")])
def test_networks_of_other_libraries_are_divided(name: str, branch: str) -> None:
    x = torch.randn(2, 3, 32, 32)
    networks = [build(ModelSpec(model=name), 5, (3, 32, 32)) for _ in range(2)]
    assert Experts(networks, branch, x[:1]).eval().by_expert(x).shape == (2, 2, 5)
    with pytest.raises(UserError, match=r"no module to branch at 'layer9'"):
        Experts(networks, "layer9", x[:1])


class Skip(nn.Module):
    """Its second layer is skipped by a sum, so that its children are no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.fc((h + self.body(h)).mean((2, 3)))


FLAT = ConvNet(3, input_shape=(1, 16, 16))  # its classifier reads a map of two by two pixels


@pytest.mark.parametrize(("network", "branch"), [(Skip(), "body"), (FLAT, "layer2")])
def test_a_network_that_is_no_chain_is_refused(network: nn.Module, branch: str) -> None:
    with pytest.raises(UserError, match=r"does more than to run its children"):
        Experts([network, network], branch, torch.randn(1, 1, 16, 16))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UserError, match="3 experts need as many exponents; given: 2"):
        MDCS(experts(), COUNTS, exponents=[1, 1])
    with pytest.raises(UserError, match=r"strong view 'hard' is not among data\.views"):
        recipe.load(RECIPE, sets=["view=hard"])


def test_a_product_loads_with_its_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    config = recipe.load(RECIPE, "smoke", ["exponents=[0, 2]", "shared_rate=0.5"])
    figures = execute(config, tmp_path / "run", cpu=True)
    assert {"accuracy_few_expert_1", "accuracy_few_expert_2", "expert_disagreement"} <= set(figures)
    product = load_product(tmp_path / "run")
    x: Tensor = torch.randn(3, *SHAPE)
    assert product.module.by_expert(x).shape == (2, 3, 10) and not product.module.training
    again = tmp_path / "again"
    product.save(again)
    torch.testing.assert_close(load_product(again).module(x), product.module(x))
