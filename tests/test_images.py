"""Image files of every mode, from every source, and those that are damaged, hostile or not samples at all."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.config.specs import DataSpec
from stillhouse.data import DataBundle, Loader, load
from stillhouse.data.images import image_files, is_grey, open_image, open_mask, standard, upright_size
from stillhouse.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))


def ramp(top: float, dtype: type = np.uint16, bottom: float = 0.0) -> np.ndarray:
    return np.linspace(bottom, top, 32 * 32).reshape(32, 32).astype(dtype)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def mean(image: Image.Image) -> list[float]:
    return [round(v / 255, 2) for v in np.atleast_2d(np.asarray(image).reshape(32 * 32, -1).mean(0))[0]]


# ---- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (ramp(65535), "PNG"),
        (ramp(65535), "TIFF"),
        (ramp(65535, np.int32), "TIFF"),
        (ramp(1e6, np.int32), "TIFF"),
        (ramp(1e4, np.int32, -1e4), "TIFF"),
        (ramp(1, np.float32), "TIFF"),
        (ramp(255, np.float32), "TIFF"),
        (ramp(4000, np.float32, -4000), "TIFF"),
        (ramp(255, np.uint8), "PNG"),
    ],
)
def test_a_ramp_over_the_range_of_its_file_is_a_ramp_from_black_to_white(values: np.ndarray, kind: str) -> None:
    image = open_image(encoded(Image.fromarray(values), kind), "here")
    read = np.asarray(image)
    assert image.mode == "L" and (read.min(), read.max()) == (0, 255)
    assert abs(read.mean() / 255 - 0.5) < 0.01 and (np.diff(read.ravel().astype(int)) >= 0).all()


def test_a_dark_sixteen_bit_image_stays_dark() -> None:
    assert mean(open_image(encoded(Image.fromarray(ramp(6553))), "here")) == [0.05]


def test_a_float_image_that_holds_no_number_is_refused() -> None:
    values = ramp(1, np.float32)
    values[0, 0] = np.nan
    with pytest.raises(UserError, match=r"Cannot read the image here \(it holds values that are not finite\)"):
        open_image(encoded(Image.fromarray(values), "TIFF"), "here")


RED = (255, 0, 0)


def coloured(mode: str) -> Image.Image:
    image = Image.new("RGB", (32, 32), RED)
    return image.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "PNG"), ("RGB", "JPEG"), ("RGB", "BMP"), ("RGB", "WEBP"), ("P", "PNG"),
     ("P", "GIF"), ("CMYK", "JPEG"), ("CMYK", "TIFF"),
                       ("RGBA", "PNG"), ("YCbCr", "JPEG")],
)  # fmt: skip
def test_red_is_red_in_every_mode(mode: str, kind: str) -> None:
    image = open_image(encoded(coloured(mode), kind), "here")
    assert image.mode == "RGB" and np.abs(np.asarray(image).astype(int) - RED).max() <= 4


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_stays_grey(mode: str) -> None:
    raw = encoded(Image.new("L", (32, 32), 255).convert(mode))
    assert open_image(raw, "here").mode == "L" and is_grey(raw, "here") and mean(open_image(raw, "here")) == [1.0]


def half_clear(mode: str) -> Image.Image:
    """The left half transparent, over black that nobody sees; the right half opaque black."""
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [("RGBA", "PNG", {}), ("LA", "PNG", {}), ("RGBA", "WEBP", {"lossless": True}), ("RGBA", "GIF", {})],
)
def test_what_is_transparent_is_white(mode: str, kind: str, options: dict[str, bool]) -> None:
    read = np.asarray(open_image(encoded(half_clear(mode), kind, **options), "here").convert("L"))
    assert (read[:, :16] == 255).all() and (read[:, 16:] == 0).all()


def test_a_transparent_colour_of_a_palette_is_white() -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 0, 0, 255])
    raw = encoded(image, transparency=1)
    assert mean(open_image(raw, "here")) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_read_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    from PIL import ImageOps

    pixels = np.zeros((16, 32), np.uint8)
    pixels[:8, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{kind.lower()}"
    Image.fromarray(pixels).convert("RGB").save(path, kind, exif=exif)
    with Image.open(path) as opened:
        wanted = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    read = open_image(path)
    assert np.array_equal(np.asarray(read), wanted) and np.array_equal(np.asarray(standard(read, "again")), wanted)
    assert upright_size(path) == (read.height, read.width)


def test_a_damaged_exif_block_does_not_lose_the_image(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), RED).save(tmp_path / "x.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert open_image(tmp_path / "x.png").size == (32, 32)


def test_a_mask_is_read_as_the_ids_that_it_holds(tmp_path: Path) -> None:
    ids = (np.arange(64).reshape(8, 8) % 11).astype(np.uint8)
    palette = Image.fromarray(ids)
    palette.putpalette([*range(255, -1, -1)] * 3)
    for name, image in {
        "grey": Image.fromarray(ids),
        "palette": palette,
        "deep": Image.fromarray(ids.astype(np.uint16)),
    }.items():
        image.save(tmp_path / f"{name}.png")
        assert np.array_equal(open_mask(tmp_path / f"{name}.png"), ids)
    Image.new("RGB", (8, 8)).save(tmp_path / "colour.png")
    with pytest.raises(UserError, match=r"The mask '.*colour.png' is in colour"):
        open_mask(tmp_path / "colour.png")


# ---- sources ---------------------------------------------------------------------------------------------------------


def write_folder(at: Path, images: list[Image.Image]) -> str:
    for i, image in enumerate(images):
        place = at / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i:02d}.png")
    return f"imagefolder:{at}"


def write_parquet(at: Path, images: list[Image.Image]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    at.mkdir(parents=True)
    rows = [{"bytes": encoded(image), "path": None} for image in images]
    pq.write_table(pa.table({"image": rows, "label": [i % 2 for i in range(len(images))]}), at / "train.parquet")
    return f"parquet:{at}"


def write_hf(at: Path, images: list[Image.Image]) -> str:
    pytest.importorskip("datasets")
    return "hf:" + write_parquet(at, images).removeprefix("parquet:")


def write_hf_bytes(at: Path, images: list[Image.Image]) -> str:
    datasets = pytest.importorskip("datasets")
    at.mkdir(parents=True)
    columns = {"image": [encoded(image) for image in images], "label": [i % 2 for i in range(len(images))]}
    datasets.Dataset.from_dict(columns).to_parquet(str(at / "train.parquet"))
    return f"hf:{at}"


def write_torchvision(at: Path, images: list[Image.Image]) -> str:
    write_folder(at, images)
    return "torchvision:ImageFolder"


def write_function(at: Path, images: list[Image.Image]) -> str:
    write_folder(at / "files", images)
    text = f"""
from pathlib import Path
from PIL import Image

def pairs(split):
    files = sorted(Path({str(at / "files")!r}).rglob("*.png"), key=lambda p: p.name)
    return [(Image.open(p), i % 2) for i, p in enumerate(files)] if split == "train" else None
"""
    (at / "own.py").write_text(text)
    return f"file:{at}/own.py:pairs"


SOURCES: list[Callable[[Path, list[Image.Image]], str]] = [
    write_folder,
    write_parquet,
    write_hf,
    write_hf_bytes,
    write_torchvision,
    write_function,
]


def pixels(bundle: DataBundle) -> torch.Tensor:
    """The training images, in [0, 1], before normalisation."""
    x = next(iter(Loader(bundle.dataset("train", train=False), 100)))["input"]
    return x * torch.tensor(bundle.std)[:, None, None] + torch.tensor(bundle.mean)[:, None, None]


@pytest.mark.parametrize("write", SOURCES)
def test_every_source_reads_sixteen_bits_palettes_and_transparency_alike(
    tmp_path: Path, write: Callable[[Path, list[Image.Image]], str]
) -> None:
    images = [Image.fromarray(ramp(65535)), coloured("P"), half_clear("RGBA"), Image.new("L", (32, 32), 128)] * 5
    name = write(tmp_path / "x", images)
    bundle = load(DataSpec(name=name, augment="plain", image_size=32), tmp_path / "x")
    assert bundle.input_shape == (3, 32, 32)
    found = {tuple(round(v, 1) for v in x.mean((1, 2)).tolist()) for x in pixels(bundle)}
    assert found == {(0.5, 0.5, 0.5), (1.0, 0.0, 0.0)}


@pytest.mark.parametrize("write", SOURCES)
def test_every_source_turns_an_image_once(tmp_path: Path, write: Callable[[Path, list[Image.Image]], str]) -> None:
    class Turned(Image.Image):
        """White above black, saved as a camera on its side does."""

        def save(self, fp: object, *args: object, **kwargs: object) -> None:
            exif = Image.Exif()
            exif[0x0112] = 6
            image = Image.new("RGB", (32, 32))
            image.paste("white", (0, 0, 16, 32))
            image.save(fp, "PNG", exif=exif)  # type: ignore[arg-type]

    bundle = load(DataSpec(name=write(tmp_path / "x", [Turned()] * 10), augment="plain", image_size=32), tmp_path / "x")
    read = pixels(bundle)
    assert (read[:, :, :16] > 0.99).all() and (read[:, :, 16:] < 0.01).all()


@pytest.mark.parametrize("write", SOURCES)
@pytest.mark.parametrize("size", [32, 120])
def test_one_grey_image_in_front_does_not_take_the_colour_of_a_set(
    tmp_path: Path, size: int, write: Callable[[Path, list[Image.Image]], str]
) -> None:
    images = [Image.new("L", (size, size), 77)] + [Image.new("RGB", (size, size), RED)] * 9
    bundle = load(DataSpec(name=write(tmp_path / "x", images), augment="plain"), tmp_path / "x")
    read = pixels(bundle)
    assert bundle.input_shape[0] == 3
    assert ((read[:, 0] - read[:, 1]).abs().amax((1, 2)) > 0.9).sum() >= len(read) - 1


@pytest.mark.parametrize("write", SOURCES[1:])
def test_a_set_of_grey_images_stays_grey(tmp_path: Path, write: Callable[[Path, list[Image.Image]], str]) -> None:
    images = [Image.new(mode, (32, 32), 60) for mode in ("L", "LA", "L")] * 4
    assert load(DataSpec(name=write(tmp_path / "x", images), augment="plain"), tmp_path / "x").input_shape[0] == 1


def test_arrays_of_a_users_function_are_read_as_images(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("""
import numpy as np

def deep(split):
    return [(np.full((8, 8), 32768, np.uint16), i % 2) for i in range(10)]

def column(split):
    return [(np.full((8, 8, 1), 128, np.uint8), i % 2) for i in range(10)]

def word(split):
    return [("a picture", i % 2) for i in range(10)]
""")
    for name in ("deep", "column"):
        bundle = load(DataSpec(name=f"file:own.py:{name}", augment="plain"), tmp_path)
        assert bundle.input_shape == (1, 8, 8) and torch.allclose(pixels(bundle), torch.tensor(128 / 255), atol=1e-3)
    with pytest.raises(UserError, match="inputs must be images, arrays, or mappings of arrays; the first is a str"):
        load(DataSpec(name="file:own.py:word"), tmp_path)


# ---- what is no sample, and what is hostile --------------------------------------------------------------------------


def test_files_of_the_system_are_no_samples(tmp_path: Path) -> None:
    write_folder(tmp_path, [Image.new("RGB", (8, 8))] * 10)
    for name in (
        "a/._00.png",
        "a/.DS_Store",
        "a/Thumbs.db",
        "b/.thumbnails/x.png",
        "__MACOSX/a/._00.png",
        ".git/x.png",
        "a/@eaDir/x.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    bundle = load(DataSpec(name=f"imagefolder:{tmp_path}"))
    assert bundle.classes == ["a", "b"] and len(bundle.dataset("train", train=False)) == 8
    assert [Path(p).name for p in image_files(tmp_path)] == [
        f"{i:02d}.png" for i in (*range(0, 10, 2), *range(1, 10, 2))
    ]


def test_parquet_files_of_the_system_are_left_out(tmp_path: Path) -> None:
    name = write_parquet(tmp_path / "x", [Image.new("RGB", (8, 8))] * 10)
    (tmp_path / "x" / "__MACOSX").mkdir()
    for place in ("._train.parquet", "__MACOSX/train.parquet"):
        (tmp_path / "x" / place).write_bytes(b"no parquet")
    assert load(DataSpec(name=name)).num_classes == 2


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels, in a few bytes."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


HOSTILE = {
    "postscript": POSTSCRIPT,
    "empty": b"",
    "text": b"hello",
    "truncated": encoded(Image.effect_noise((64, 64), 90))[:300],
    "truncated_jpeg": encoded(Image.effect_noise((64, 64), 90), "JPEG")[:300],
    "bomb": bomb(),
    "header": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x08\0\0\0\x08\x08\xff\0\0\0\0\0\0\0",
    "tiff": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 60,
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("write", [write_folder, write_parquet, write_hf, write_torchvision])
def test_a_file_that_is_no_image_is_named_and_starts_nothing(
    tmp_path: Path, kind: str, write: Callable[[Path, list[Image.Image]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    class Bad(Image.Image):
        def save(self, fp: object, *args: object, **kwargs: object) -> None:
            (fp.write if isinstance(fp, io.BytesIO) else Path(fp).write_bytes)(HOSTILE[kind])  # type: ignore[arg-type]

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a program was started")

    name = write(tmp_path / "x", [Image.new("RGB", (100, 100)), *[Bad()] * 11])
    monkeypatch.setattr(subprocess, "Popen", never)
    with pytest.raises(UserError, match=r"^Cannot read the image (in row \d+ of .*|'.*\.png')"):
        bundle = load(DataSpec(name=name, augment="plain"), tmp_path / "x")
        list(Loader(bundle.dataset("train", train=False), 4))


def test_damaged_bytes_raise_nothing_but_a_sentence() -> None:
    draws = np.random.default_rng(0)
    whole = [
        encoded(coloured("RGB"), "JPEG"),
        encoded(half_clear("RGBA")),
        encoded(coloured("P"), "GIF"),
        encoded(Image.fromarray(ramp(1, np.float32)), "TIFF"),
        encoded(coloured("RGB"), "WEBP"),
        encoded(coloured("RGB"), "BMP"),
        b"P5 8 8 255\n" + bytes(64),
    ]
    refused = 0
    for trial in range(280):
        raw = bytearray(whole[trial % len(whole)])
        for at in draws.integers(0, len(raw), 6):
            raw[at] = draws.integers(0, 256)
        try:
            assert open_image(bytes(raw[: len(raw) - trial % 3 * 9]), "here").mode in ("L", "RGB")
        except UserError as told:
            refused += str(told).startswith("Cannot read the image here")
    assert refused > 20


@pytest.mark.parametrize("where", ["a/9.png", "."])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, where: str) -> None:
    write_folder(tmp_path / "x", [Image.new("RGB", (8, 8))] * 4)
    pipe = tmp_path / "x" / where if where != "." else tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    name = f"imagefolder:{tmp_path}/x" if where != "." else f"text:{pipe}"
    with pytest.raises(UserError, match=r"no regular file|neither a file nor a folder"):
        load(DataSpec(name=name))
    with pytest.raises(UserError, match=r"it is no regular file \(a pipe"):
        open_image(pipe)


# ---- folders of another kind -----------------------------------------------------------------------------------------


def tree(root: Path, files: list[str]) -> Path:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".jpg", ".png"):
            Image.new("RGB", (8, 8)).save(path)
        else:
            path.write_text("{}")
    return root


LAYOUTS = {
    "Pascal VOC": ["Annotations/1.xml", "ImageSets/Main/train.txt", "JPEGImages/1.jpg"],
    "Pascal VOC data": ["VOCdevkit/VOC2012/Annotations/1.xml", "VOCdevkit/VOC2012/JPEGImages/1.jpg"],
    "COCO": ["annotations/instances_train2017.json", "train2017/1.jpg", "val2017/2.jpg"],
    "COCO data": ["train/_annotations.coco.json", "train/1.jpg", "valid/_annotations.coco.json"],
    "YOLO": ["images/train/1.jpg", "labels/train/1.txt", "data.yaml"],
    "YOLO data": ["train/images/1.jpg", "train/labels/1.txt", "valid/images/2.jpg", "valid/labels/2.txt"],
    "segmentation": ["train/images/1.jpg", "train/labels/1.png", "test/images/2.jpg", "test/labels/2.png"],
    "segmentation ": ["images/1.jpg", "masks/1.png"],
    "for segmentation": ["train/1.png", "trainannot/1.png", "val/2.png", "valannot/2.png"],
    "segmentation (": ["leftImg8bit/train/aachen/1.png", "gtFine/train/aachen/1_labelIds.png"],
    "boxes or outlines": ["images/1.jpg", "annotations/1.xml"],
}


@pytest.mark.parametrize("words", LAYOUTS)
def test_a_folder_of_boxes_or_masks_is_recognised_and_not_read_as_classes(tmp_path: Path, words: str) -> None:
    root = tree(tmp_path, LAYOUTS[words])
    with pytest.raises(UserError, match=r"copy them into a folder for each class") as told:
        load(DataSpec(name=f"imagefolder:{root}"))
    assert words.strip() in str(told.value) and ("data.name: masks:" in str(told.value)) == ("segmentation" in words)


def test_folders_of_classes_with_telling_names_are_read(tmp_path: Path) -> None:
    tree(
        tmp_path,
        [
            f"{split}/{c}/{i}.jpg"
            for split in ("train", "test")
            for c in ("mask", "no_mask", "train_station")
            for i in range(3)
        ],
    )
    assert load(DataSpec(name=f"imagefolder:{tmp_path}")).classes == ["mask", "no_mask", "train_station"]


def test_a_class_without_images_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, ["cat/1.jpg", "cat/2.jpg", "dog/notes.txt"])
    with pytest.raises(UserError, match=r"the class folder '.*/dog' holds no images"):
        load(DataSpec(name=f"imagefolder:{tmp_path}"))


def test_real_sets_of_boxes_and_masks_are_no_classes(data_root: Path) -> None:
    for name, words in [("bccd", "Pascal VOC"), ("camvid", "segmentation")]:
        with pytest.raises(UserError, match=words):
            load(DataSpec(name=f"imagefolder:{name}"), data_root)


def test_classes_of_whole_numbers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    tree(tmp_path, [f"{c}/{i}.jpg" for c in range(12) for i in range(2)])
    assert load(DataSpec(name=f"imagefolder:{tmp_path}")).classes == [str(i) for i in range(12)]
