"""FYI: a host method that learns from every image and its mirror image at once, so that one stored image explains both.

paper: FYI: Flip Your Images for Dataset Distillation
venue: ECCV 2024
arxiv: 2407.08113
task: classification
family: dataset distillation
use when: images keep their class when mirrored, and another method that learns pixels is already in use
needs: a host method with `mirror` (dm, datadam, mtt, dsa), given whole as `host`

While matching, the host sees [S; F(S)], images and then their mirror images, class by class, before augmentation; real
images are not doubled and the flips are not stored. Augmentation draws a flip first (p 0.5, one for the batch) and then
one of the other groups. For mtt inner batches are halved before they are doubled; its recipe here takes `unroll:
steps`, the memory-saving gradient of the released code, and `full` is the whole one. `mirror: false` is the host alone,
with its own augmentation; both are judged alike, with a flip first, and mini-batches are not doubled there. With dsa
the batches of the network's own training are doubled too.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from stillhouse import catalog
from stillhouse.config.specs import Data, MethodConfig, ModelSpec
from stillhouse.errors import UserError
from stillhouse.functional.augmentation import groups_of
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.recipe import validate
from stillhouse.runs.run import Run
from stillhouse.synthetic.config import AugmentSpec, EvaluateSpec, PixelConfig
from stillhouse.synthetic.product import SyntheticSet


class Config(MethodConfig):
    data: Data
    host: dict[str, Any] = Field(description="The host's recipe, without data and seed: its `method` and options.")
    mirror: bool = Field(True, description="false: the host alone, judged in the same way.")
    handed: bool = Field(False, description="Go on where mirrored images change their class, as digits do.")
    _host: PixelConfig = PrivateAttr()

    @model_validator(mode="after")
    def _settle_host(self) -> Config:
        if "method" not in self.host:
            raise ValueError("host.method is missing: name the method that learns the images, such as dm")
        method = str(self.host["method"])
        if not issubclass(catalog.method(method).Config, PixelConfig):
            raise ValueError(
                f"host.method: '{method}' does not learn pixels from real images; take dm, datadam, mtt or dsa"
            )
        given = validate({**self.host, "data": self.data.model_dump(), "seed": self.seed}, "host")
        assert isinstance(given, PixelConfig)
        flips = flip_first(given.augment)
        judged = given.evaluate.model_copy(update={"augment": given.evaluate.augment or flips})
        learns = {"mirror": True, "augment": flips} if self.mirror else {"mirror": False}
        self._host = given.model_copy(update={"evaluate": judged, **learns})
        return self

    @property
    def evaluate(self) -> EvaluateSpec:
        """The host's."""
        return self._host.evaluate

    @property
    def network(self) -> ModelSpec:
        """The host's."""
        return self._host.network

    @property
    def augment(self) -> AugmentSpec:
        """The host's."""
        return self._host.augment


def flip_first(spec: AugmentSpec) -> AugmentSpec:
    """The same augmentation with the flip out of the groups of which one is drawn, and always drawn first."""
    rest = "_".join(g for g in groups_of(spec.groups) if g != "flip")
    always = [g for g in groups_of(spec.always) if g != "flip"]
    return AugmentSpec(groups=rest, always="_".join(["flip", *always]))


def asymmetry(images: Tensor) -> float:
    """Mean |x - F(x)| of images (N, C, H, W): how much of their content stands on one side only."""
    return float((images - images.flip(-1)).abs().mean())


class FlipYourImages(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        handed = not getattr(run.data(config.data), "flip", True)
        if config.mirror and handed and not config.handed:
            raise UserError(
                f"fyi: images of '{config.data.name}' change their class when mirrored; set handed=true to learn from "
                "mirror images all the same."
            )
        host = config._host
        return catalog.method(host.method).plan(host, run)

    def run(self, config: Config, run: Run) -> SyntheticSet:
        host = config._host
        product: SyntheticSet = catalog.method(host.method).run(host, run)
        product.figures["asymmetry"] = asymmetry(product.images)
        return product
