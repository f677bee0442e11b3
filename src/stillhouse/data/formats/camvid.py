"""CamVid: `camvid`, street scenes with masks of eleven classes; its folder is read as `masks:` reads one."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from stillhouse.config.specs import DataSpec
from stillhouse.data.formats import masks
from stillhouse.data.formats.masks import KEYS
from stillhouse.data.samples import SampleBundle

__all__ = ["KEYS", "REST", "Options", "load"]
REST = ""
CLASSES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]


class Options(masks.Options):
    """data.options of `camvid`."""

    classes: list[str] = Field(CLASSES, description="Class names, in the order of their ids in the masks.")
    ignore: int | None = Field(11, description="The id in the masks that counts for nothing.")


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> SampleBundle:
    """`camvid` under the data root as a bundle. Raises as `masks:`."""
    return masks.load("camvid", spec, options, root)
