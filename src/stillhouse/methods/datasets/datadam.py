"""DataDAM: synthetic images whose mean attention maps and mean features in random networks are those of their class.

paper: DataDAM: Efficient Dataset Distillation with Attention Matching
venue: ICCV 2023
arxiv: 2310.00093
task: classification
family: dataset distillation
use when: images have texture, and a set must be made without bilevel training: as cheap as DM
needs: real images with labels; a network of two or more stages without batch statistics, such as a ConvNet with
instance norm

Every iteration, in a fresh random network, the mean spatial attention map of each class (sum over channels of
|F|^power, L2-normalised) is matched after every activation but the last, and the mean feature before the classifier.
`power: 1` is the released code, 4 the paper's. Both terms carry the code's factor 100, `task_balance` 0.01 that of the
features. With `task_balance: 0.01, attention: 0` the loss is DM's. Whitening, where asked for, is fitted on the
training data, not on the initial synthetic set as in the code. Evaluation reports the last epoch, not the best.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.matching import class_means, feature_mean_distance, few
from stillhouse.functional.precision import full_precision
from stillhouse.methods.datasets.dm import embedding
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run
from stillhouse.signals import Taps
from stillhouse.synthetic.config import PixelConfig
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.synthesis import Synthesis, plan

SCALE = 100.0
"""The factor of the released code, to which its learning rates are tuned."""


class Config(PixelConfig):
    batch_real: int = Field(64, ge=1, description="Real images per class and iteration.")
    power: float = Field(1.0, ge=1, description="Of |F| in the attention maps: 1 in the code, 4 in the paper.")
    task_balance: float = Field(0.01, ge=0, description="lambda: weight of the features, times 100.")
    attention: float = Field(1.0, ge=0, description="Weight of the attention maps, times 100; 0: DM.")


@full_precision
def attention_map(features: Tensor, power: float = 1.0, norm: int | None = 2) -> Tensor:
    """sum_c |F_c|^power of (N, C, H, W), as (N, H * W) of unit `norm` (eps 1e-12: an empty map stays 0); None: as it
    is."""
    sizes = features.abs()
    maps = (sizes if power == 1 else sizes.pow(power)).sum(1).flatten(1)
    return maps if norm is None else F.normalize(maps, p=float(norm), dim=1)


@full_precision
def attention_terms(real: list[Tensor], synthetic: list[Tensor], classes: int, power: float = 1.0) -> Tensor:
    """(layers,): 100 sum_c |mean A(real) - mean A(synthetic)|^2 for each layer; the real side has no gradient. At most
    400 classes each.

    Args:
        real, synthetic: activations (classes * n, C, H, W) and (classes * m, C, H, W), layer by layer, class-major.

    Raises:
        UserError: batches that do not divide into classes.
    """
    real_maps = [attention_map(r.detach(), power) for r in real]
    return map_terms(real_maps, [attention_map(s, power) for s in synthetic], classes)


def map_terms(real: list[Tensor], synthetic: list[Tensor], classes: int) -> Tensor:
    """`attention_terms` of attention maps (classes * n, H * W) and (classes * m, H * W), layer by layer."""
    means = [(class_means(r, classes), class_means(s, classes)) for r, s in zip(real, synthetic, strict=True)]
    return torch.stack([SCALE * (r - s).square().sum() for r, s in means])


def activations(network: nn.Module) -> list[str]:
    """The taps whose attention is matched: the activations of all stages but the last.

    Raises:
        UserError: a network that names none, or has only one.
    """
    names = [f"{stage}.act" for stage in getattr(network, "stage_names", [])]
    if not names or not hasattr(network.get_submodule(names[0].partition(".")[0]), "act"):
        raise UserError(
            f"datadam taps the activation of every stage of a ConvNet, and {type(network).__name__} has none; take "
            "stillhouse:convnet."
        )
    if len(names) < 2:
        raise UserError(
            "datadam matches attention after every activation but the last, and this network has only one; take a "
            "deeper one."
        )
    return names[:-1]


def losses(
    network: nn.Module, real: Tensor, synthetic: Tensor, classes: int, power: float, task_balance: float
) -> dict[str, Tensor]:
    """`attention` (layers,) and `features`, a scalar with its weight, of class-major augmented batches; `embeddings` of
    both."""
    taps = Taps(network, activations(network))

    def seen(x: Tensor) -> list[Tensor]:
        """The embedding, and the attention maps layer by layer."""
        with taps.capture() as found:
            return [embedding(network, x), *(attention_map(found[n], power) for n in taps.names)]

    def all_of(x: Tensor) -> list[Tensor]:
        return [torch.cat(parts) for parts in zip(*(seen(part) for part in few(x)))]

    try:
        with torch.no_grad():
            real_embedding, *real_maps = all_of(real)
        synthetic_embedding, *synthetic_maps = all_of(synthetic)
    finally:
        taps.remove()
    features = SCALE * task_balance * feature_mean_distance(real_embedding, synthetic_embedding, classes)
    terms = map_terms(real_maps, synthetic_maps, classes)
    return {"attention": terms, "features": features, "real": real_embedding, "synthetic": synthetic_embedding}


class AttentionMatching(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        activations(run.model(config.network, config.data))
        does = f"match attention and mean features of {config.batch_real} real images a class in random networks"
        return plan(run, config, "datadam", does, config.iterations)

    def run(self, config: Config, run: Run) -> SyntheticSet:
        made = Synthesis(config, run)

        def loss(i: int) -> dict[str, Tensor]:
            real, synthetic = made.batches(i)
            found = losses(made.network(i), real, synthetic, made.classes, config.power, config.task_balance)
            attention = config.attention * found["attention"].sum()
            return {"loss": attention + found["features"], "attention": attention, "features": found["features"]}

        made.learn("datadam", loss)
        return made.product()
