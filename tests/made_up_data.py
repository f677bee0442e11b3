"""Data of the shape of public data sets that are not at hand, for rehearsals of recipes: a row a set."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from stillhouse.config.specs import DataSpec
from stillhouse.data.bundle import labelled
from stillhouse.data.source import IMAGENET_MEAN, IMAGENET_STD, Samples, Source
from stillhouse.randomness import generator
from stillhouse.runs.run import Run

IMAGES: dict[str, tuple[int, tuple[int, int, int], int]] = {
    # name: classes, size of an image, images of a class (as many as a step of a recipe takes)
    "cifar10": (10, (3, 32, 32), 1100),
    "torchvision:CIFAR10": (10, (3, 32, 32), 100),
    "torchvision:CIFAR100": (100, (3, 32, 32), 60),
    "torchvision:MNIST": (10, (1, 28, 28), 100),
    "torchvision:FashionMNIST": (10, (1, 28, 28), 100),
    "torchvision:OxfordIIITPet": (37, (3, 375, 500), 20),
    "torchvision:FGVCAircraft": (100, (3, 375, 500), 2),
    "imagefolder:cub200": (200, (3, 375, 500), 2),
    "imagefolder:stanford_dogs": (120, (3, 375, 500), 2),
    "imagefolder:caltech101": (101, (3, 375, 500), 2),
    "imagefolder:nabirds": (555, (3, 375, 500), 1),
    "imagefolder:imagenet": (1000, (3, 375, 500), 2),
    "imagefolder:imagenet22k": (1000, (3, 375, 500), 2),  # a pool: of its 21,841 classes nothing is known
    "imagefolder:imagenet_lt": (1000, (3, 375, 500), 2),
    "imagefolder:inaturalist2018": (8142, (3, 375, 500), 1),
    "imagefolder:places_lt": (365, (3, 375, 500), 3),
    **{f"imagefolder:office_home/{n}": (65, (3, 375, 500), 2) for n in ("Art", "Clipart", "Product", "Real World")},
}
PAIRS = frozenset({"shards:yfcc15m", "shards:albef4m", "pairs:flickr30k", "pairs:webvid"})
MASKS = {"masks:voc2012_aug": (500, 375), "masks:cityscapes": (2048, 1024)}
OBJECTS = {"instances:voc2012_sbd": (250, 188)}  # name: size of an image
PHOTOGRAPHS = {"restore:DIV2K/DIV2K_train_HR": 768}  # name: a side in pixels
BOXES = {"coco:coco": 80, "voc:VOCdevkit/VOC0712": 20}  # name: classes
CLOUDS = {"kitti:kitti"}
TEXTS: dict[str, dict[str, Any]] = {
    "text:hf:EdinburghNLP/xsum": {"document": "w1 w2 w3 w4 w5 w6", "summary": "w7 w8"},
    "text:hf:stanfordnlp/sst2": {"sentence": "w1 w2 w3 w4", "label": 1},
    "text:wikipedia_and_books.txt": {"text": "w1 w2 w3 w4 w5 w6 w7 w8"},
    "text:ultrachat.jsonl": {"prompt": "w1 w2 w3", "completion": "w4 w5 w6"},
}
CONVERSATIONS = {"conversations:pile_passages.json": [["w1 w2 w3 .", "w4"], ["w5 w6", "w1"]]}
ROWS = {"text:wikipedia_and_books.txt": 2400}
"""Of sets of which a step takes more than 100."""
VOCABULARIES = {
    "Qwen/Qwen2-1.5B": 151646,
    "openai/clip-vit-base-patch32": 49408,
    "huggyllama/llama-7b": 32000,
    "google/t5-v1_1-small": 32128,
    "google/t5-v1_1-xl": 32128,
    "meta-llama/Llama-2-7b-chat-hf": 32000,
    "google-bert/bert-base-uncased": 30522,
    "TinyLlama/TinyLlama_v1.1": 32000,
    **{f"openai/clip-vit-{n}": 49400 for n in ("base-patch16", "base-patch32", "large-patch14")},
    "apple/DFN5B-CLIP-ViT-H-14-378": 49400,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # name on the hub: its config
    "google/t5-v1_1-small": (
        "t5",
        {"d_model": 512, "d_ff": 1024, "num_heads": 6, "num_layers": 8, "vocab_size": 32128},
    ),
    "google/t5-v1_1-xl": (
        "t5",
        {"d_model": 2048, "d_ff": 5120, "num_heads": 32, "num_layers": 24, "vocab_size": 32128},
    ),
    "google-bert/bert-base-uncased": ("bert", {}),
    "google/bert_uncased_L-6_H-768_A-12": ("bert", {"num_hidden_layers": 6}),
    "TinyLlama/TinyLlama_v1.1": (
        "llama",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4},
    ),
    "meta-llama/Llama-2-7b-chat-hf": ("llama", {}),
    "huggyllama/llama-7b": ("llama", {}),
    "openai/clip-vit-base-patch16": ("clip", {"vision_config": {"patch_size": 16}}),
    "openai/clip-vit-base-patch32": ("clip", {"vision_config": {"patch_size": 32}}),
    "openai/clip-vit-large-patch14": (
        "clip",
        {
            "projection_dim": 768,
            "vision_config": {
                "patch_size": 14,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
            },
            "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        },
    ),
    "apple/DFN5B-CLIP-ViT-H-14-378": (
        "clip",
        {
            "projection_dim": 1024,
            "vision_config": {
                "image_size": 378,
                "patch_size": 14,
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "num_hidden_layers": 32,
                "num_attention_heads": 16,
            },
            "text_config": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
            },
        },
    ),
    "huawei-noah/TinyBERT_General_4L_312D": (
        "bert",
        {"hidden_size": 312, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 1200},
    ),
    "Qwen/Qwen2-1.5B": (
        "qwen2",
        {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
        | {"num_key_value_heads": 2, "vocab_size": 151936},
    ),
    "Qwen/Qwen2-7B": (
        "qwen2",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        | {"num_key_value_heads": 4, "vocab_size": 152064},
    ),
    "openai/clip-vit-large-patch14-336": (
        "clip",
        {
            "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
            | {"num_attention_heads": 16, "patch_size": 14, "image_size": 336}
        },
    ),
    "nvidia/mit-b2": (
        "segformer",
        {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 4, 6, 3], "decoder_hidden_size": 768},
    ),
    "nvidia/mit-b1": ("segformer", {"hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 256}),
}


def load(run: Run, spec: Any, folder: Path) -> Any:
    """Made-up data for a spec; None for a set that has no row here."""
    if spec.name in IMAGES and isinstance(spec, DataSpec):
        classes, shape, each = IMAGES[spec.name]
        train, test = (
            _samples(f"{spec.name} {split}", classes, shape, count)
            for split, count in (("train", each), ("test", max(300 // classes, 1)))
        )
        photos = shape[1] > 96
        names = [str(i) for i in range(classes)]
        found = Source(
            train,
            names,
            (3, 224, 224) if photos else shape,
            test,
            mean=IMAGENET_MEAN[: shape[0]],
            std=IMAGENET_STD[: shape[0]],
        )
        fewer = {"size": len(train), "test_size": len(test)}
        whole = {key: None for key, count in fewer.items() if (getattr(spec, key) or 0) > count}
        return labelled(found, spec.model_copy(update=whole))
    if spec.name in MASKS:
        width, height = MASKS[spec.name]
        place = folder / spec.name.replace(":", "_")
        if not place.exists():
            for split in ("train", "val", "test"):
                for name, kind, mode in (("images", "jpg", "RGB"), ("labels", "png", "L")):
                    (place / split / name).mkdir(parents=True)
                    for i in range(4 if split == "train" else 1):
                        Image.new(mode, (width, height), i).save(place / split / name / f"{i}.{kind}")
        return _read(run, spec, f"masks:{place}")
    if spec.name in OBJECTS:
        place, (width, height) = folder / spec.name.replace(":", "_"), OBJECTS[spec.name]
        classes = len(spec.options["classes"]) - 1
        for split, count in {"train": 2 * classes, "val": 1}.items() if not place.exists() else ():
            for name in ("images", "labels", "objects"):
                (place / split / name).mkdir(parents=True)
            for i in range(count):
                numbers = np.zeros((height, width), np.uint8)
                numbers[20:90, 20:90], numbers[100:160, 100:200] = 1, 2
                Image.new("RGB", (width, height)).save(place / split / "images" / f"{i}.jpg")
                Image.fromarray(np.where(numbers > 0, i % classes + 1, 0).astype(np.uint8)).save(
                    place / split / "labels" / f"{i}.png"
                )
                Image.fromarray(numbers).save(place / split / "objects" / f"{i}.png")
        return _read(run, spec, f"instances:{place}")
    if spec.name in PHOTOGRAPHS:
        side, scale = PHOTOGRAPHS[spec.name], int(spec.options["scale"])
        place = folder / f"photographs_{scale}"
        for name, times in (("true", 1), ("low", scale)):
            (place / name).mkdir(parents=True, exist_ok=True)
            for i in range(5):
                Image.new("RGB", (side // times, side // times), (9 * i,) * 3).save(place / name / f"{i}.png")
        options = {**spec.options, "low": str(place / "low"), "test": None, "test_low": None}
        return _read(run, spec.model_copy(update={"options": options}), f"restore:{place / 'true'}")
    if spec.name in BOXES:
        place = folder / spec.name.replace(":", "_").replace("/", "_")
        for split, count in {"train": 40, "val": 2}.items() if not place.exists() else ():
            (place / split).mkdir(parents=True)
            content = {
                "images": [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(count)],
                "categories": [{"id": i, "name": str(i)} for i in range(BOXES[spec.name])],
                "annotations": [
                    {"id": 2 * i + n, "image_id": i, "category_id": n, "bbox": [9, 9, 29, 29]}
                    for i in range(count)
                    for n in (0, 1)
                ],
            }
            (place / split / "_annotations.coco.json").write_text(json.dumps(content))
            for i in range(count):
                Image.new("RGB", (64, 48)).save(place / split / f"{i}.jpg")
        return _read(run, spec.model_copy(update={"options": {}}), f"coco:{place}")
    if spec.name.startswith("visual_chat:"):
        place = folder / "chats"
        (place / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(place / "images" / "a.jpg")
        said = [{"from": "human", "value": "<image> w1 w2"}, {"from": "gpt", "value": "w3 w4"}]
        record: dict[str, Any] = {"image": "a.jpg", "conversations": said}
        if "preferences" in spec.name:
            record = {"image": "a.jpg", "question": "w1 w2", "chosen": "w3", "rejected": "w4 w5"}
        path = place / f"{spec.name.partition(':')[2]}"
        path.write_text(json.dumps([record] * 40))
        options = {**spec.options, "images": str(place / "images")}
        return _read(run, spec.model_copy(update={"options": options}), f"visual_chat:{path}")
    if spec.name in CLOUDS:
        place = folder / spec.name.replace(":", "_")
        if not place.exists():
            _clouds(place)
        return _read(run, spec, f"kitti:{place}")
    inner = spec.name.removeprefix("captions:")
    if inner != spec.name and inner in IMAGES:
        place = folder / inner.replace(":", "_").replace("/", "_")
        if not place.exists():
            image = _photograph(folder)
            for split, name in product(("train", "test"), range(IMAGES[inner][0])):
                (place / split / str(name)).mkdir(parents=True)
                (place / split / str(name) / "0.png").hardlink_to(image)
        return _read(run, spec, f"captions:imagefolder:{place}")
    if spec.name in PAIRS:
        place, lines = folder / spec.name.replace(":", "_"), [f"{i}.png,w{i + 1} w2 w3\n" for i in range(8)]
        for split in ("train", "test") if not place.exists() else ():
            (place / split).mkdir(parents=True)
            (place / split / "metadata.csv").write_text("".join(["file_name,text\n", *lines]))
            for i in range(8):
                (place / split / f"{i}.png").hardlink_to(_photograph(folder))
        return _read(run, spec, f"pairs:{place}")
    if spec.name in TEXTS:
        place = folder / f"{spec.name.split('/')[-1].split(':')[-1]}.jsonl"
        count = ROWS.get(spec.name, 100)
        rows = [TEXTS[spec.name] | ({"label": i % 2} if "label" in TEXTS[spec.name] else {}) for i in range(count)]
        place.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return _read(run, spec, f"text:{place}")
    if spec.name in CONVERSATIONS:
        turns = [
            {"role": r, "content": t} for turn in CONVERSATIONS[spec.name] for r, t in zip(("user", "assistant"), turn)
        ]
        place = folder / "conversations.json"
        place.write_text(json.dumps([{"messages": turns}] * 300))
        return _read(run, spec.model_copy(update={"options": {**spec.options, "test": None}}), f"conversations:{place}")
    return None


def _clouds(place: Path) -> None:
    """A folder as KITTI's, of clouds in which a car stands."""
    for part in ("velodyne", "label_2", "calib"):
        (place / "training" / part).mkdir(parents=True)
    (place / "ImageSets").mkdir()
    for split, count in (("train", 12), ("val", 2)):
        names = [f"{split}{i}" for i in range(count)]
        (place / "ImageSets" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            points = torch.rand(200, 4, generator=generator(name)) * torch.tensor([40.0, 10.0, 2.0, 1.0])
            points.numpy().tofile(place / "training" / "velodyne" / f"{name}.bin")
            (place / "training" / "calib" / f"{name}.txt").write_text(
                "P2: 700 0 600 0 0 700 180 0 0 0 1 0\nR0_rect: 1 0 0 0 1 0 0 0 1\n"
                "Tr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0\n"
            )
            (place / "training" / "label_2" / f"{name}.txt").write_text(
                "Car 0 0 0 100 100 200 200 1.5 1.6 3.9 2.0 1.7 10.0 -1.57\n"
            )


def _photograph(folder: Path) -> Path:
    """The file of one image."""
    path = folder / "photograph.png"
    if not path.exists():
        Image.new("RGB", (500, 375), (90, 120, 150)).save(path)
    return path


def _read(run: Run, spec: Any, name: str) -> Any:
    from stillhouse.data import load as read

    return read(spec.model_copy(update={"name": name}))


def _samples(name: str, classes: int, shape: tuple[int, int, int], each: int) -> Samples:
    labels = np.repeat(np.arange(classes), each)
    image = torch.randint(0, 256, shape, generator=generator(name), dtype=torch.uint8)
    several = lambda rows: image.expand(len(rows), *shape)  # noqa: E731
    return Samples(labels, name, lambda i: image, several if shape[1] <= 96 else None)


def published_tokenizer(name: str) -> Any:
    """A tokenizer of words `w1 w2 …` with as many as the published one of that name has."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "<cls>", "<sep>"]
    words = special + [f"w{i}" for i in range(VOCABULARIES[name] - len(special))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = dict(zip(("pad", "bos", "eos", "unk", "mask", "cls", "sep"), special))
    return PreTrainedTokenizerFast(tokenizer_object=made, **{f"{k}_token": v for k, v in marks.items()})


def config_of(name: str) -> tuple[str, dict[str, Any]]:
    """The name and options by which transformers builds a published network without its files."""
    kind, options = CONFIGS[name]
    return f"config:{kind}", options
