"""Data by name: splits, batches that are a function of keys, and what a user is told when the data is not as asked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from stillhouse.config.specs import DataSpec
from stillhouse.data import DataBundle, IndexedDataset, Loader, adapt, load
from stillhouse.data.augment import crop_flip, partners
from stillhouse.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def cifar_root() -> str:
    root = os.environ.get("STILLHOUSE_DATA")
    if not root or not (Path(root) / "cifar10").is_dir():
        pytest.skip("STILLHOUSE_DATA names no folder with cifar10/")
    return root


def digits(**options) -> DataBundle:
    return load(DataSpec(name="digits", **options))


def make_images(folder: Path, counts: dict[str, int], size: tuple[int, int] = (40, 30), kind: str = "jpg") -> Path:
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
                folder / name / f"{i}.{kind}"
            )
    return folder


def write_parquet(
    path: Path,
    labels: list,
    *,
    size: int = 12,
    image: str = "img",
    label: str = "label",
    names: list[str] | None = None,
) -> Path:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, rows = np.random.default_rng(len(labels)), []
    for _ in labels:
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(out, "PNG")
        rows.append({"bytes": out.getvalue(), "path": None})
    table = pa.table({image: rows, label: labels})
    if names:
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": {label: {"names": names}}}})}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# Batches


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixup": 0.4, "cutmix": 1.0},
        {"augment": [{"RandomCrop": {"size": 8, "padding": 2}}, "RandomHorizontalFlip"]},
    ],
)
def test_two_workers_and_a_start_in_mid_epoch_give_the_same_batches_to_the_bit(options):
    data = digits(size=100, **options).dataset("train", train=True)
    here = list(Loader(data, 32, seed=3, shuffle=True).batches(epochs=3))
    workers = list(Loader(data, 32, seed=3, shuffle=True, workers=2).batches(epochs=3))
    resumed = list(Loader(data, 32, seed=3, shuffle=True).batches(epoch=1, batch=2, epochs=3))
    assert len(here) == 12 and len(workers) == 12 and len(resumed) == 6
    assert all(map(same, here, workers))
    assert all(map(same, here[6:], resumed))


def test_batches_do_not_touch_the_global_random_state():
    data = digits(size=40, mixup=0.2, augment=["RandomHorizontalFlip"]).dataset("train", train=True)
    for workers in (0, 1):
        torch.manual_seed(5)
        np.random.seed(5)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        next(Loader(data, 16, shuffle=True, workers=workers).batches())
        assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_epochs_and_seeds_have_other_orders_and_other_augmentation():
    data = digits(size=60).dataset("train", train=True)
    epochs = list(Loader(data, 60, shuffle=True).batches(epochs=2))
    other = next(Loader(data, 60, seed=1, shuffle=True).batches())
    for batch in (epochs[1], other):
        assert not torch.equal(epochs[0]["index"], batch["index"])
        by_index = [b["input"][b["index"].argsort()] for b in (epochs[0], batch)]
        assert not torch.equal(*by_index)
        assert sorted(batch["index"].tolist()) == list(range(60))


@pytest.mark.parametrize("options", [{}, {"mixup": 1.0}, {"cutmix": 1.0}])
@pytest.mark.parametrize(("batch", "world"), [(32, 2), (30, 2), (27, 3)])
def test_the_shares_of_all_processes_make_up_the_batch_of_one(options, batch, world):
    data = digits(size=100, **options).dataset("train", train=True)
    whole = list(Loader(data, batch, shuffle=True))
    shares = [list(Loader(data, batch, shuffle=True, rank=r, world=world)) for r in range(world)]
    assert {len(s) for s in shares} == {len(whole)}
    for one, *parts in zip(whole, *shares):
        joined = {k: torch.cat([p[k] for p in parts]) for k in one}
        assert same(one, joined)
    assert len(whole[-1]["index"]) == 100 % batch


def test_a_batch_size_that_the_processes_do_not_divide_is_an_error():
    with pytest.raises(UserError, match="batch size 10 is over all 4 processes"):
        Loader(digits(size=20).dataset("train", train=True), 10, world=4)


def test_the_last_partial_batch_is_dropped_only_if_told_and_not_alone():
    data = digits(size=50).dataset("train", train=False)
    for size, drop, lengths in [
        (20, False, [20, 20, 10]),
        (20, True, [20, 20]),
        (64, True, [50]),
        (25, False, [25, 25]),
    ]:
        loader = Loader(data, size, drop_last=drop)
        assert [len(b["label"]) for b in loader] == lengths and len(loader) == len(lengths)


def test_an_empty_data_set_and_a_start_beyond_the_epoch_are_errors(tmp_path):
    loader = Loader(digits(size=20).dataset("train", train=True), 8)
    assert list(loader.batches(batch=3, epochs=1)) == []
    with pytest.raises(UserError, match="Cannot start at batch 5 of an epoch of 3"):
        loader.batches(batch=5)
    empty = IndexedDataset(lambda *_: torch.zeros(0), np.zeros(0, np.int64), 2)
    for stream in (lambda: Loader(empty, 8).batches(), lambda: iter(Loader(empty, 8, workers=1))):
        with pytest.raises(UserError, match="holds no samples"):
            stream()
    (tmp_path / "none.py").write_text(
        "def none(split):\n    return []\n\ndef one(split):\n    return [(1.0, 0)] if split == 'train' else None\n"
    )
    for function, message in [
        ("none", "holds no samples"),
        ("one", "has no test split, and one training sample is too few"),
    ]:
        with pytest.raises(UserError, match=message):
            load(DataSpec(name=f"file:{tmp_path}/none.py:{function}"))


def test_batches_have_the_promised_types():
    bundle = digits(size=30, mixup=0.5)
    mixed = next(iter(Loader(bundle.dataset("train", train=True), 8)))
    plain = next(iter(Loader(bundle.dataset("train", train=False), 8)))
    assert mixed["input"].shape == (8, *bundle.input_shape) and mixed["input"].dtype == torch.float32
    assert mixed["label"].shape == (8, 10) and mixed["label"].dtype == torch.float32
    assert plain["label"].dtype == plain["index"].dtype == torch.int64
    assert plain["index"].tolist() == list(range(8))


@pytest.mark.parametrize("options", [{"mixup": 0.3}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}])
def test_mixed_labels_sum_to_one_and_say_what_is_in_the_image(options):
    data = digits(size=95, **options).dataset("train", train=True)
    for batch in Loader(data, 32, shuffle=True).batches(epochs=2):
        assert torch.allclose(batch["label"].sum(1), torch.ones(len(batch["label"])))
        own = data.labels()[batch["index"]]
        assert (batch["label"].gather(1, own[:, None]) >= batch["label"].min()).all() and (
            (batch["label"] > 0).sum(1) <= 2
        ).all()


def test_cutmix_keeps_the_share_of_pixels_that_the_label_says():
    bundle = digits(size=40, cutmix=1.0, augment="plain")
    clean = next(iter(Loader(bundle.dataset("train", train=False), 40)))
    mixed = next(iter(Loader(bundle.dataset("train", train=True), 40)))
    other = partners(np.arange(40), 40)
    share = (mixed["input"] == clean["input"]).float().mean((1, 2, 3))
    from_other = (mixed["input"] == clean["input"][other]).float().mean((1, 2, 3))
    own = mixed["label"].gather(1, clean["label"][:, None])[:, 0][clean["label"] != clean["label"][other]]
    assert ((share + from_other) >= 1).all()
    assert own.unique().numel() == 1 and (own * 64).frac().abs().max() < 1e-3


def test_every_sample_is_mixed_with_another():
    for count in (2, 5, 8):
        pairs = partners(np.arange(count), count)
        assert (pairs != np.arange(count)).all() and pairs.min() >= 0 and pairs.max() < count
    assert partners(np.arange(1), 1).tolist() == [0]


def test_the_fast_crop_and_flip_equals_one_made_by_hand():
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 6, 6), dtype=np.uint8)
    draws = np.array([[0.0, 0.99, 0.9], [0.5, 0.5, 0.1]])
    made = crop_flip(images, np.array([2, 0]), draws, pad=2, flip=True)
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    assert (made[0] == padded[2][:, 0:6, 4:10]).all()
    assert (made[1] == images[0][..., ::-1]).all()


def test_digits_shift_but_never_flip_and_evaluation_is_untouched():
    bundle = digits()
    images, _ = bundle._decoded(bundle.splits["train"])
    clean = torch.cat([b["input"] for b in Loader(bundle.dataset("train", train=False), 512)])
    assert torch.allclose(clean * bundle.std[0] + bundle.mean[0], images / 255, atol=1e-6)
    assert clean.mean().abs() < 0.01 and abs(clean.std() - 1) < 0.01
    moved = torch.cat([b["input"] for b in Loader(bundle.dataset("train", train=True), 512)])
    padded = torch.nn.functional.pad(clean, (1, 1, 1, 1), value=clean.min().item())
    shifts = torch.stack([padded[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    found = (shifts - moved).abs().amax((2, 3, 4)) < 1e-5
    assert found.any(0).all() and (found.sum(1) > 50).all()


# Splits


def test_a_subset_is_balanced_stable_and_nested():
    small, again, large, other = (
        digits(size=n, seed=s).splits["train"] for n, s in [(100, 0), (100, 0), (205, 0), (100, 1)]
    )
    assert np.bincount(small.labels).tolist() == [10] * 10
    assert (small.positions == again.positions).all() and set(small.positions) <= set(large.positions)
    assert set(np.bincount(large.labels)) == {20, 21}
    assert set(small.positions) != set(other.positions)


def test_a_rare_class_gives_all_it_has_to_a_subset(tmp_path):
    folder = make_images(tmp_path / "train", {"a": 2, "b": 9, "c": 9})
    labels = load(DataSpec(name=f"imagefolder:{folder.parent}", size=10)).dataset("train", train=False).labels()
    assert labels.bincount().tolist() == [2, 4, 4]


def test_splits_are_stratified_disjoint_and_complete():
    bundle = digits(val=0.1, holdout=0.2)
    parts = {k: bundle.splits[k].positions for k in ("train", "holdout", "val")}
    together = np.concatenate(list(parts.values()))
    assert len(together) == len(np.unique(together)) == len(digits().splits["train"].positions)
    for name, share in [("val", 0.1), ("holdout", 0.2)]:
        counts = bundle.dataset(name, train=False).labels().bincount(minlength=10)
        assert len(parts[name]) == round(share * len(together)) and counts.max() - counts.min() <= 2
    assert bundle.has("val") and not digits().has("val")


def test_label_noise_changes_the_share_asked_for_and_only_in_training():
    clean, noisy = digits(), digits(label_noise=0.3)
    a, b = (x.dataset("train", train=True).labels() for x in (clean, noisy))
    assert (a != b).sum() == round(0.3 * len(a)) and b.min() == 0 and b.max() == 9
    assert torch.equal(*(x.dataset("test", train=False).labels() for x in (clean, noisy)))
    loader = Loader(noisy.dataset("train", train=True), 64, shuffle=True)
    batch = next(iter(loader))
    assert torch.equal(loader.labels()[batch["index"]], batch["label"]) and loader.count == len(b)


def test_noise_does_not_move_the_splits():
    clean, noisy = digits(holdout=0.2), digits(holdout=0.2, label_noise=0.5)
    assert (clean.splits["holdout"].positions == noisy.splits["holdout"].positions).all()


def test_classes_are_kept_and_renumbered_in_the_order_given():
    bundle = digits(classes=[7, 2])
    assert bundle.classes == ["7", "2"] and bundle.num_classes == 2
    assert set(bundle.dataset("test", train=False).labels().tolist()) == {0, 1}
    sevens = bundle.splits["test"].positions[bundle.splits["test"].labels == 0]
    assert (digits().splits["test"].labels[sevens] == 7).all()


def test_fingerprints_differ_where_the_data_differs_and_only_there():
    base = digits(size=100)
    assert base.fingerprint == digits(size=100, workers=2, augment="plain").fingerprint
    others = [
        {"size": 110},
        {"seed": 1},
        {"holdout": 0.1},
        {"label_noise": 0.1},
        {"test_size": 50},
        {"classes": [0, 1]},
        {"image_size": 16},
    ]
    prints = [digits(**{"size": 100, **o}).fingerprint for o in others]
    assert len({base.fingerprint, *prints}) == len(others) + 1


def test_the_fingerprint_of_a_folder_follows_its_content_and_not_its_place(tmp_path):
    for name in ("one", "two", "three"):
        make_images(tmp_path / name / "train", {"a": 3, "b": 3})
    next((tmp_path / "three" / "train" / "b").glob("2.*")).unlink()
    one, two, three = (load(DataSpec(name=f"imagefolder:{tmp_path}/{n}")).fingerprint for n in ("one", "two", "three"))
    assert one == two != three


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 5000}, r"data.size is 5000, but the data set holds 1438"),
        ({"test_size": 500}, r"data.test_size is 500, but the data set holds 359"),
        ({"classes": [0, 10]}, r"data.classes: there is no class 10; the data set has classes 0 to 9"),
        ({"classes": [1, 1]}, r"each once"),
        ({"classes": [1], "label_noise": 0.1}, r"label_noise needs at least two classes"),
        ({"val": 0.6, "holdout": 0.6}, r"leave none of 1438 samples for training"),
        ({"options": {"split": "x"}}, r"data.options: unknown key 'split'; valid keys there: none"),
    ],
)
def test_splits_that_cannot_be_made_are_told_in_a_sentence(options, message):
    with pytest.raises(UserError, match=message):
        digits(**options)


def test_a_split_that_is_not_there_names_the_key_that_makes_it():
    with pytest.raises(UserError, match=r"has no holdout split; set data.holdout, such as data.holdout=0.1"):
        digits().dataset("holdout", train=False)
    with pytest.raises(UserError, match="no split 'trian'; did you mean 'train'"):
        digits().has("trian")


# Augmentation by name


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (["RandomHorizontalFlp"], r"data.augment.0: .*'RandomHorizontalFlp'; did you mean 'RandomHorizontalFlip'"),
        (
            ["RandomHorizontalFlip", {"RandomCrop": {"size": 8, "pading": 1}}],
            r"data.augment.1.RandomCrop: unknown argument 'pading'; did you mean 'padding'",
        ),
        ([{"RandomCrop": {}}], r"data.augment.0.RandomCrop: .*missing.*'size'"),
        ([{"RandomCrop": 8}], r"data.augment.0.RandomCrop: name the arguments, such as \{RandomCrop: \{size: 8\}\}"),
        ([{"RandomErasing": {"p": 3}}], r"data.augment.0.RandomErasing: "),
        ([{"Normalize": {"mean": [0.5], "std": [0.5]}}], r"data.augment.0.Normalize: leave it out"),
        (["MixUp"], r"set data.mixup instead"),
        ([{"RandomApply": {"transforms": ["Blurr"]}}], r"data.augment.0.RandomApply.transforms.0: "),
    ],
)
def test_a_wrong_transform_or_argument_is_told_with_its_place(augment, message):
    with pytest.raises(UserError, match=message):
        digits(augment=augment)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_that_does_not_fit_the_images_is_told(workers):
    data = digits(size=20, augment=[{"RandomCrop": {"size": 64}}]).dataset("train", train=True)
    with pytest.raises(UserError, match=r"^data.augment cannot be applied to sample \d+: Required crop size"):
        next(iter(Loader(data, 4, workers=workers)))


def test_a_list_of_transforms_is_applied_to_training_only():
    bundle = digits(
        size=50,
        augment=[
            {"RandomHorizontalFlip": {"p": 1.0}},
            {"RandomApply": {"transforms": ["RandomVerticalFlip"], "p": 0.0}},
        ],
    )
    train, plain = (next(iter(Loader(bundle.dataset("train", train=t), 50)))["input"] for t in (True, False))
    assert torch.equal(train, plain.flip(-1))


def test_image_size_resizes_images():
    bundle = digits(image_size=12, size=20, augment=[{"RandomCrop": {"size": 6}}])
    assert bundle.input_shape == (1, 12, 12)
    for train in (True, False):
        assert next(iter(Loader(bundle.dataset("train", train=train), 4)))["input"].shape == (4, 1, 12, 12)


# CIFAR-10 and Parquet


def test_cifar10_decodes_only_the_subset_and_reads_the_same_pixels_from_its_cache(cifar_root):
    spec = DataSpec(name="cifar10", size=200, test_size=100)
    first, again = load(spec, cifar_root), load(spec, cifar_root)
    batches = [next(iter(Loader(b.dataset("train", train=True), 128, shuffle=True))) for b in (first, again)]
    assert same(*batches) and batches[0]["input"].shape == (128, 3, 32, 32)
    assert first.classes[3] == "cat" and first.dataset("train", train=True).labels().bincount().tolist() == [20] * 10
    assert first.fingerprint == again.fingerprint
    kept = list((Path(os.environ["STILLHOUSE_CACHE"]) / "images").rglob("*.npy"))
    assert len(kept) == 1 and len(np.load(kept[0])) == 200


def test_a_subset_of_a_decoded_set_has_the_pixels_of_those_samples(tmp_path):
    write_parquet(tmp_path / "p" / "train-0.parquet", [0, 1] * 20)
    write_parquet(tmp_path / "p" / "test-0.parquet", [0, 1] * 5)
    spec = DataSpec(name=f"parquet:{tmp_path}/p", size=6, augment="plain")
    subset = next(iter(Loader(load(spec).dataset("train", train=False), 6)))
    whole_bundle = load(spec.model_copy(update={"size": None}))
    whole = next(iter(Loader(whole_bundle.dataset("train", train=False), 40)))
    positions = load(spec).splits["train"].positions
    assert (
        torch.equal(subset["input"], whole["input"][positions]) and len(whole_bundle.dataset("test", train=False)) == 10
    )
    assert whole["input"].mean().abs() < 0.01 and whole_bundle.input_shape == (3, 12, 12)
    from_whole_cache = next(iter(Loader(load(spec).dataset("train", train=False), 6)))
    assert same(subset, from_whole_cache)


def test_parquet_columns_are_found_or_named_and_words_are_labels(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", ["dog", "cat"] * 10, image="picture", label="species")
    with pytest.raises(UserError, match=r"no column 'img'; .*Name it with data.options.image_column"):
        load(DataSpec(name=f"parquet:{path}"))
    bundle = load(DataSpec(name=f"parquet:{path}", options={"image_column": "picture", "label_column": "species"}))
    assert bundle.classes == ["cat", "dog"] and len(bundle.dataset("test", train=False)) == 4
    with pytest.raises(UserError, match="did you mean 'image_column'"):
        load(DataSpec(name=f"parquet:{path}", options={"image_colum": "picture"}))


def test_large_images_in_parquet_are_decoded_one_by_one(tmp_path):
    path = write_parquet(tmp_path / "photos" / "train.parquet", [0, 1] * 5, size=120, names=["no", "yes"])
    bundle = load(DataSpec(name=f"parquet:{path.parent}", image_size=20))
    here, workers = (list(Loader(bundle.dataset("train", train=True), 4, workers=w)) for w in (0, 2))
    assert bundle.classes == ["no", "yes"] and here[0]["input"].shape == (4, 3, 20, 20)
    assert all(map(same, here, workers)) and not list((Path(os.environ["STILLHOUSE_CACHE"])).rglob("*.npy"))


def test_files_that_are_no_parquet_or_hold_another_size_are_told(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"parquet: cannot read '.*bad.parquet'"):
        load(DataSpec(name=f"parquet:{tmp_path}/bad.parquet"))
    write_parquet(tmp_path / "mixed" / "train-0.parquet", [0, 1])
    write_parquet(tmp_path / "mixed" / "train-1.parquet", [0, 1, 1], size=20)
    with pytest.raises(UserError, match="20x20 pixels, but the first is 12x12"):
        load(DataSpec(name=f"parquet:{tmp_path}/mixed"))


def test_cifar10_that_is_not_there_and_cannot_be_fetched_names_the_data_root(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"CIFAR-10 is not under '.*/file'.*--data-root or STILLHOUSE_DATA"):
        load(DataSpec(name="cifar10"), tmp_path / "file")


# Folders


def test_an_image_folder_has_its_own_validation_and_test_splits(tmp_path):
    for split, count in [("train", 6), ("val", 2), ("test", 3)]:
        make_images(tmp_path / split, {"cat": count, "dog": count})
    bundle = load(DataSpec(name=f"imagefolder:{tmp_path}", image_size=24, val=0.5))
    sizes = {s: len(bundle.dataset(s, train=False)) for s in ("train", "val", "test")}
    assert sizes == {"train": 12, "val": 4, "test": 6} and bundle.classes == ["cat", "dog"]
    here, workers = (list(Loader(bundle.dataset("train", train=True), 5, shuffle=True, workers=w)) for w in (0, 2))
    assert all(map(same, here, workers)) and here[0]["input"].shape == (5, 3, 24, 24)


def test_a_lone_val_folder_is_the_test_split_and_flat_folders_give_a_fifth(tmp_path):
    make_images(tmp_path / "a" / "train", {"x": 5, "y": 5})
    make_images(tmp_path / "a" / "val", {"x": 2, "y": 1})
    make_images(tmp_path / "flat", {"x": 10, "y": 5})
    lone, flat = (
        load(DataSpec(name="imagefolder:a"), tmp_path),
        load(DataSpec(name="imagefolder:flat", val=0.25), tmp_path),
    )
    assert len(lone.dataset("test", train=False)) == 3 and not lone.has("val")
    assert flat.dataset("test", train=False).labels().bincount().tolist() == [2, 1]
    assert len(flat.dataset("val", train=False)) == 3 and lone.input_shape == (3, 224, 224)


def test_evaluation_takes_the_centre_of_the_resized_image(tmp_path):
    image = np.zeros((40, 80, 3), dtype=np.uint8)
    image[:, 30:50] = 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    bundle = load(DataSpec(name=f"imagefolder:{tmp_path}", image_size=28))
    x = next(iter(Loader(bundle.dataset("test", train=False), 1)))["input"][0]
    grey = x * torch.tensor(bundle.std)[:, None, None] + torch.tensor(bundle.mean)[:, None, None]
    assert grey[:, 14, 14].min() > 0.99 and grey[:, :, 0].max() < 0.01 and torch.allclose(x, x.flip(-1), atol=0.05)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_also_from_a_worker(tmp_path, workers):
    make_images(tmp_path / "train", {"a": 4, "b": 4})
    broken = tmp_path / "train" / "b" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    bundle = load(DataSpec(name=f"imagefolder:{tmp_path}", image_size=16))
    with pytest.raises(UserError) as told:
        for split in ("train", "test"):
            list(Loader(bundle.dataset(split, train=True), 4, workers=workers))
    assert str(told.value).startswith(f"Cannot read the image '{broken}'") and "Traceback" not in str(told.value)


def test_missing_and_empty_folders_are_told(tmp_path):
    make_images(tmp_path / "pets", {"cat": 1})
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    for name, message in [
        (f"{tmp_path}/pest", r"There is no file or folder '.*/pest'; did you mean '.*/pets'"),
        (f"{tmp_path}/empty", "holds no class folders"),
        (f"{tmp_path}/hollow", "holds no images"),
    ]:
        with pytest.raises(UserError, match=message):
            load(DataSpec(name=f"imagefolder:{name}"))
    make_images(tmp_path / "split" / "train", {"cat": 2})
    make_images(tmp_path / "split" / "test", {"cats": 2})
    with pytest.raises(
        UserError, match="test/cats' is a class that the training set does not have; did you mean 'cat'"
    ):
        load(DataSpec(name=f"imagefolder:{tmp_path}/split"))


# Other libraries and own functions


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "no data set 'digit'; did you mean 'digits'"),
        ("imagefolder", "stands for many data sets; name one as 'imagefolder:PATH'"),
        ("torchvision:FashionMNST", "did you mean 'FashionMNIST'"),
        ("file:nowhere", "must be 'file:PATH.py:FUNCTION'"),
    ],
)
def test_a_wrong_name_is_told_with_the_nearest(name, message):
    with pytest.raises(UserError, match=message):
        load(DataSpec(name=name))


def test_torchvision_data_sets_take_their_options(tmp_path):
    bundle = load(
        DataSpec(name="torchvision:FakeData", options={"size": 40, "image_size": [3, 16, 16], "num_classes": 4}),
        tmp_path,
    )
    assert bundle.input_shape == (3, 16, 16) and bundle.num_classes == 4
    assert len(bundle.dataset("train", train=True)) == 32 and len(bundle.dataset("test", train=False)) == 8
    assert next(iter(Loader(bundle.dataset("train", train=True), 4)))["input"].shape == (4, 3, 16, 16)
    with pytest.raises(UserError, match="'num_clases'; did you mean 'num_classes'"):
        load(DataSpec(name="torchvision:FakeData", options={"num_clases": 4}), tmp_path)


def test_torchvision_sets_in_memory_take_the_fast_path(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in [("train", 30), ("t10k", 10)]:
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            b"\0\0\x08\x03" + np.array(pixels.shape, ">i4").tobytes() + pixels.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + np.array([count], ">i4").tobytes() + (np.arange(count) % 10).astype(np.uint8).tobytes()
        )
    bundle = load(DataSpec(name="torchvision:MNIST"), tmp_path)
    x = next(iter(Loader(bundle.dataset("train", train=False), 30)))["input"]
    assert x.shape == (30, 1, 28, 28) and x.mean().abs() < 0.01 and len(bundle.dataset("test", train=False)) == 10
    assert bundle.dataset("train", train=True)._inputs.flip is False


def test_hugging_face_data_sets_are_read_from_a_local_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (10, 10), (60 * i, 0, 0)).save(tmp_path / "pets" / split / name / f"{i}.png")
    bundle = load(DataSpec(name="hf:pets", options={"cache_dir": str(tmp_path / "hf")}), tmp_path)
    assert bundle.classes == ["cat", "dog"] and bundle.input_shape == (3, 10, 10)
    batch = next(iter(Loader(bundle.dataset("train", train=True), 8, workers=2)))
    assert batch["label"].tolist() == [0] * 4 + [1] * 4
    with pytest.raises(UserError, match=r"has no column 'picture'.*data.options.image_column"):
        load(DataSpec(name="hf:pets", options={"cache_dir": str(tmp_path / "hf"), "image_column": "picture"}), tmp_path)


OWN = """
import numpy as np, torch
from PIL import Image

def vectors(split, width=3):
    if split == "val":
        return None
    return [(torch.full((width,), float(i)), i % 2) for i in range(10 if split == "train" else 4)]

def images(split):
    return [(Image.new("L", (9, 9), 25 * i), i % 2) for i in range(10)] if split == "train" else None

def tokens(split):
    return [({"input_ids": torch.arange(4) + i, "attention_mask": torch.ones(4)}, i % 2) for i in range(6)]

def ragged(split):
    return [(torch.zeros(1 + i), 0) for i in range(6)]

def texts(split):
    return [("good", "label")]

def number(split):
    return 3
"""


def test_a_users_own_function_gives_vectors_images_or_mappings(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    vectors = load(DataSpec(name="file:own.py:vectors", options={"width": 5}), tmp_path)
    batch = next(iter(Loader(vectors.dataset("train", train=True), 4)))
    assert (
        vectors.input_shape == (5,)
        and vectors.mean == ()
        and torch.equal(batch["input"][:, 0], torch.arange(4.0))
        and len(vectors.dataset("test", train=False)) == 4
    )
    images = load(DataSpec(name="file:own.py:images"), tmp_path)
    assert images.input_shape == (1, 9, 9)
    assert next(iter(Loader(images.dataset("train", train=True), 4, workers=2)))["input"].shape == (4, 1, 9, 9)
    tokens = next(iter(Loader(load(DataSpec(name="file:own.py:tokens"), tmp_path).dataset("train", train=True), 3)))
    assert (
        tokens["input"]["input_ids"].tolist()[2] == [2, 3, 4, 5]
        and tokens["input"]["attention_mask"].dtype == torch.float32
    )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("vector", "has no function 'vector'; did you mean 'vectors'"),
        ("texts", "labels must be whole numbers"),
        ("number", "gives a int; it must give a sequence"),
        ("ragged", "different shapes"),
    ],
)
def test_what_a_users_function_gets_wrong_is_told(tmp_path, function, message):
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(UserError, match=message):
        list(
            Loader(load(DataSpec(name=f"file:{tmp_path}/own.py:{function}")).dataset("train", train=True), 4, workers=1)
        )


def test_options_that_need_images_are_refused_for_vectors(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(UserError, match=r"data.image_size"):
        load(DataSpec(name="file:own.py:vectors", image_size=8), tmp_path)
    with pytest.raises(UserError, match=r"data.cutmix needs images"):
        load(DataSpec(name="file:own.py:vectors", cutmix=1.0), tmp_path).dataset("train", train=True)


# Loaders made elsewhere


class Noisy(TensorDataset):
    """Augments by torch's default generator, as users' transforms do."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand(()), y


@pytest.mark.parametrize("generator", [None, 1])
def test_a_users_loader_gives_the_same_stream_again_and_from_mid_epoch(generator):
    data = Noisy(torch.arange(10.0)[:, None], torch.arange(10) % 3)

    def stream(**where):
        made = DataLoader(
            data, 4, shuffle=True, generator=generator and torch.Generator().manual_seed(torch.seed() % 1000)
        )
        out = []
        for batch in adapt(made, seed=7).batches(**where, epochs=3):
            out.append(batch)
            torch.rand(3)
        return out

    whole, resumed = stream(), stream(epoch=1, batch=2)
    assert len(whole) == 9 and all(map(same, whole[5:], resumed))
    assert not torch.equal(whole[0]["input"], whole[3]["input"])


def test_tuples_and_mappings_become_batches():
    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    assert next(adapt([(x, y)]).batches()).keys() == {"input", "label"}
    assert next(adapt([{"input": x, "label": y, "index": y}]).batches()).keys() == {"input", "label", "index"}
    hugging = next(adapt([{"pixel_values": x, "labels": y}]).batches())
    assert hugging["input"].keys() == {"pixel_values"} and hugging["label"] is y
    loader = Loader(digits(size=20).dataset("train", train=True), 4)
    assert adapt(loader) is loader
    own = adapt(DataLoader(TensorDataset(x, y), 2))
    assert len(own) == 1 and own.count == 2 and own.labels().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (iter([1]), "can be read only once"),
        (5, "must be a DataLoader"),
        ([], "holds no samples"),
        ([(1, 2, 3)], "gives a tuple of 3"),
        (["ab"], "gives a str"),
    ],
)
def test_loaders_that_cannot_be_used_are_told(given, message):
    with pytest.raises(UserError, match=message):
        next(adapt(given).batches())
