"""FerKD: labels restored and adapted as its card says, regions replayed exactly, stores that refuse what they are not
of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as V

from stillhouse.config.specs import DataSpec
from stillhouse.data import BatchKey, Loader, load
from stillhouse.errors import UserError
from stillhouse.methods.classification.ferkd.batches import MixSpec, RegionReplay, Thresholds
from stillhouse.methods.classification.ferkd.labels import adapt, bands, compress, cutmix, restore, within_images
from stillhouse.methods.classification.ferkd.method import Config, count_bands
from stillhouse.methods.classification.ferkd.regions import RegionStore, draw_regions, replay

FACTS = {
    "crops": 6,
    "label_type": "marginal_smoothing",
    "top": 3,
    "num_classes": 10,
    "precision": "float32",
    "data": "digits",
}


def filled(folder: Path, images: int, **facts: object) -> RegionStore:
    folder.mkdir(exist_ok=True)
    store = RegionStore.create(folder, images, {**FACTS, **facts})
    rows = store.missing()
    coords, flips = draw_regions(rows, store.crops, (8, 8), (0.3, 1.0), (0.75, 4 / 3), 0)
    probs = torch.softmax(2 * torch.randn(len(rows), store.crops, 10, generator=torch.Generator().manual_seed(0)), -1)
    store.write(rows, coords, flips, *compress(probs, store.facts["label_type"], store.facts["top"]))
    return store


def replayed(
    store: RegionStore, thresholds: Thresholds | None = None, how: str = "none", epochs: int = 8
) -> RegionReplay:
    dataset = load(DataSpec(name="digits", size=len(store))).dataset("train", train=False)
    return RegionReplay(dataset, store, 20, epochs, 4, thresholds or Thresholds(), MixSpec(how))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ori", "hard", "smoothing", "marginal_smoothing", "marginal_renorm"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_restored_labels_sum_to_one_and_are_never_negative(kind: str, precision: torch.dtype) -> None:
    probs = torch.softmax(torch.randn(50, 12) * 8, -1)
    values, classes = compress(probs, kind, 3)
    restored = restore(values.to(precision), classes, kind, 12)
    torch.testing.assert_close(
        restored.sum(-1), torch.ones(50), atol=1e-3 if precision == torch.float16 and kind == "ori" else 1e-5, rtol=0
    )
    assert restored.min() >= 0
    assert torch.equal(restored.argmax(-1), probs.argmax(-1))


def test_keeping_as_many_classes_as_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="keeps 5 of 5 classes"):
        compress(torch.full((2, 5), 0.2), "marginal_smoothing", 5)


def test_thresholds_at_their_ends_are_fkd_and_plain_smoothed_labels() -> None:
    soft, labels = torch.softmax(torch.randn(30, 7), -1), torch.randint(7, (30,))
    assert torch.equal(adapt(soft, labels, bands(soft.amax(-1), 0.0, 0.0, 1.0), 0.1), soft)
    hardened = adapt(soft, labels, bands(soft.amax(-1), 0.0, 1.1, 1.0), 0.1)
    torch.testing.assert_close(hardened.gather(1, labels[:, None])[:, 0], torch.full((30,), 0.9 + 0.1 / 7))
    torch.testing.assert_close(hardened.sum(-1), torch.ones(30))


def test_the_bands_are_those_of_the_thresholds() -> None:
    assert bands(torch.tensor([0.1, 0.15, 0.29, 0.3, 0.9, 0.95]), 0.15, 0.3, 0.9).tolist() == [0, 1, 1, 2, 2, 3]


def test_an_image_that_loses_every_region_keeps_its_most_confident_one_with_its_own_label() -> None:
    band = Thresholds(low=0.5, middle=0.6).of(torch.tensor([[0.2, 0.4, 0.3], [0.2, 0.9, 0.55]]))
    assert band.tolist() == [[0, 1, 0], [0, 2, 1]]


def test_replayed_regions_are_those_that_were_drawn_on_images_that_are_not_square() -> None:
    images = torch.randint(256, (2, 3, 20, 36), dtype=torch.uint8)
    coords, flips = draw_regions(np.arange(2), 5, (20, 36), (0.1, 0.9), (0.75, 4 / 3), 3)
    got = replay(images, coords, flips, (16, 16))
    for n in range(2):
        for k in range(5):
            top, left, h, w = (coords[n, k].double() * torch.tensor([20, 36, 20, 36])).round().int().tolist()
            crop = V.resized_crop(images[n].float(), top, left, h, w, [16, 16], antialias=True)
            torch.testing.assert_close(got[n, k], crop.flip(-1) if flips[n, k] else crop, atol=0.01, rtol=0)


def test_regions_have_the_range_of_area_and_shape_that_was_asked_for() -> None:
    coords, flips = draw_regions(np.arange(400), 4, (64, 64), (0.2, 0.6), (0.75, 4 / 3), 0)
    area, aspect = coords[..., 2] * coords[..., 3], coords[..., 3] / coords[..., 2]
    assert area.min() > 0.19 and area.max() < 0.62 and aspect.min() > 0.7 and aspect.max() < 1.4
    assert (coords[..., 0] + coords[..., 2]).max() <= 1 and 0.45 < flips.float().mean() < 0.55
    again, _ = draw_regions(np.array([17]), 4, (64, 64), (0.2, 0.6), (0.75, 4 / 3), 0)
    assert torch.equal(again[0], coords[17])


def test_selfmix_of_equal_crops_changes_nothing_and_stays_within_images() -> None:
    partner = within_images(3, 2, torch.tensor([1, 2, 0]))
    assert partner.tolist() == [1, 2, 0, 4, 5, 3]
    x, soft = (
        torch.randn(2, 1, 3, 8, 8).expand(2, 3, 3, 8, 8).flatten(0, 1),
        torch.softmax(torch.randn(2, 1, 5), -1).expand(2, 3, 5).flatten(0, 1),
    )
    mixed, labels = cutmix(x, soft, 0.4, (2, 5), partner)
    torch.testing.assert_close(mixed, x)
    torch.testing.assert_close(labels, soft)


def test_a_batch_holds_several_distinct_regions_of_each_image_and_the_last_epochs_one(tmp_path: Path) -> None:
    loader = Loader(replayed(filled(tmp_path, 100)), 20, seed=1, drop_last=True)
    batches = list(loader.batches(0, 0, 8))
    assert len(batches) == 8 * 5
    assert torch.equal(batches[0]["index"].view(5, 4), batches[0]["index"].view(5, 4)[:, :1].expand(-1, 4))
    first_pass = torch.cat([b["index"] for b in batches[:20]])
    assert first_pass.bincount().tolist() == [4] * 100  # one load of all images, four regions each
    assert not torch.equal(batches[0]["input"][0], batches[0]["input"][1])
    assert all(len(torch.cat([b["index"] for b in batches[e * 5 : e * 5 + 5]]).unique()) == 100 for e in range(4, 8))


@pytest.mark.parametrize("how", ["none", "selfmix", "batch"])
def test_batches_are_the_same_from_the_middle_and_in_shares(tmp_path: Path, how: str) -> None:
    store = filled(tmp_path, 60)
    whole = list(Loader(replayed(store, how=how), 20, seed=4, drop_last=True).batches(0, 0, 8))
    later = next(Loader(replayed(store, how=how), 20, seed=4, drop_last=True).batches(2, 1, 8))
    assert torch.equal(later["input"], whole[7]["input"]) and torch.equal(later["stored"], whole[7]["stored"])
    torch.testing.assert_close(later["stored"].sum(-1), torch.ones(20))
    if how == "none":
        parts = [
            next(Loader(replayed(store), 40, seed=4, drop_last=True, rank=r, world=2).batches(0, 0, 8))
            for r in range(2)
        ]
        assert torch.equal(
            torch.cat([p["input"] for p in parts]),
            next(Loader(replayed(store), 40, seed=4, drop_last=True).batches(0, 0, 8))["input"],
        )


def test_dropped_regions_never_train(tmp_path: Path) -> None:
    store, thresholds = filled(tmp_path, 60), Thresholds(low=0.4, middle=0.4)
    dataset = replayed(store, thresholds)
    for batch in Loader(dataset, 20, seed=0, drop_last=True).batches(0, 0, 4):
        kept = (store.confidence(np.arange(60)) >= 0.4).any(1)[batch["index"]]
        assert (batch["stored"].amax(-1)[kept] >= 0.4).all()


def test_a_store_that_was_cut_off_is_gone_on_with_and_refused_until_it_is_whole(tmp_path: Path) -> None:
    store = RegionStore.create(tmp_path, 10, FACTS)
    rows = np.arange(4)
    coords, flips = draw_regions(rows, 6, (8, 8), (0.3, 1.0), (0.75, 4 / 3), 0)
    store.write(rows, coords, flips, *compress(torch.full((4, 6, 10), 0.1), "marginal_smoothing", 3))
    with pytest.raises(UserError, match="lacks the image 4 and 5 others"):
        RegionStore.open(tmp_path, {})
    assert RegionStore.create(tmp_path, 10, FACTS).missing().tolist() == [4, 5, 6, 7, 8, 9]


def test_a_store_of_other_classes_or_images_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 10)
    with pytest.raises(UserError, match="num_classes = 10, but this recipe has 100"):
        RegionStore.open(tmp_path, {"num_classes": 100})
    with pytest.raises(UserError, match="knows no image 10"):
        RegionStore.open(tmp_path, {}).confidence(np.array([3, 10]))


@pytest.mark.parametrize("kind", ["ori", "hard", "marginal_renorm"])
def test_every_type_of_label_survives_the_store(tmp_path: Path, kind: str) -> None:
    filled(tmp_path, 10, label_type=kind, precision="float16")
    labels = RegionStore.open(tmp_path, {"label_type": kind}).labels(np.arange(10), np.zeros((10, 2), dtype=np.int64))
    torch.testing.assert_close(labels.sum(-1), torch.ones(10, 2), atol=2e-3, rtol=0)


def test_adapting_raises_the_accuracy_of_the_labels(tmp_path: Path) -> None:
    found = count_bands(
        filled(tmp_path, 50), Thresholds(0.15, 0.4, 1.0), torch.arange(50) % 10, [str(c) for c in range(10)]
    )
    figures = found["figures"]
    assert figures["adapted_label_accuracy"] > figures["region_label_accuracy"]
    assert figures["regions_kept"] + figures["regions_hardened"] + figures["regions_dropped"] == pytest.approx(1)
    nothing = count_bands(
        filled(tmp_path, 50), Thresholds(1.1, 1.1, 1.1), torch.arange(50) % 10, [str(c) for c in range(10)]
    )
    assert nothing["lost"] == [str(c) for c in range(10)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"crops": 9, "regions": {"crops": 8}}, "stores only 8"),
        ({"train": {"batch_size": 30}}, "must be a multiple of crops"),
        ({"adapt": {"low": 0.5, "middle": 0.2}}, "must not exceed middle"),
        ({"labels": "live"}, "set adapt: null"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Config.model_validate(
            {"method": "ferkd", "data": "digits", "teacher": "stillhouse:mlp", "student": "stillhouse:mlp", **change}
        )


def test_the_loader_hands_over_the_images_own_labels(tmp_path: Path) -> None:
    dataset = replayed(filled(tmp_path, 60))
    batch = dataset.batch(BatchKey(0, np.arange(20), 0, 20), 0)
    assert torch.equal(batch["label"], dataset.labels()[batch["index"]])
