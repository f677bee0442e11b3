"""Image and text: captions as data, networks of two libraries in one space, zero-shot and retrieval figures, teachers
of classifiers, products."""

from __future__ import annotations

import io
import json
import math
import socket
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import BatchKey, load
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.evaluation.image_text import base_and_new, harmonic, recall
from stillhouse.evaluation.judge import judge
from stillhouse.models.tokenizer import texts_padded, tokenizer, too_long, with_marks
from stillhouse.objectives.contrastive import Contrastive, contrastive_loss, sigmoid_loss
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.prediction import predict
from stillhouse.runs.products import load_product
from stillhouse.tasks.image_text import ImageText

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP = {
    "model": "hf:config:clip",
    "options": {
        "projection_dim": 16,
        "vision_config": {**SMALL, "patch_size": 8},
        "text_config": SMALL,
    },
}
SIGLIP = {
    "model": "hf:config:siglip",
    "options": {"vision_config": {**SMALL, "patch_size": 8}, "text_config": {**SMALL, "projection_size": 16}},
}
BERT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWERS = {
    "model": "stillhouse:two_towers",
    "options": {
        "dim": 12,
        "image": {"model": "timm:test_resnet", "frozen": True, "size": 32, "mean": [0.5] * 3, "std": [0.5] * 3},
        "text": {"model": "hf:config:bert", "options": BERT},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of three colours, a folder a colour."""
    base, draw = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for name, colour in COLOURS.items():
            (base / split / name).mkdir(parents=True)
            for i in range(count):
                image = np.clip(np.array(colour) + draw.integers(-30, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(base / split / name / f"{i}.png")
    return base


def data(folder: Path, **options: Any) -> dict[str, Any]:
    options = {"templates": ["a {} square", "something {}"], "tokenizer": "bytes", "context": 40, **options}
    return {"name": f"captions:imagefolder:{folder}", "image_size": 16, "augment": "plain", "options": options}


def bundle(folder: Path, **options: Any) -> Any:
    return load(DataSpec.model_validate(data(folder, **options)))


def network(task: ImageText, spec: dict[str, Any] = CLIP, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return task.build(ModelSpec.model_validate(spec))


# ---- data ----------------------------------------------------------------------------------------------------------


def test_training_captions_are_wordings_of_the_class_and_a_function_of_seed_epoch_and_sample(folder: Path):
    found = bundle(folder)
    dataset, key = found.dataset("train", train=True), BatchKey(3, np.arange(36), 0, 36)
    batch, again = dataset.batch(key, 1), dataset.batch(BatchKey(3, np.arange(36), 10, 20), 1)
    texts = found.task.tokenizer.batch_decode(batch["input"]["input_ids"], skip_special_tokens=True)
    wordings = {"a blue square", "something blue", "a green square", "something green", "a red square", "something red"}
    assert set(texts) == wordings
    assert all(found.classes[label] in text for label, text in zip(batch["label"].tolist(), texts))
    part = found.task.tokenizer.batch_decode(again["input"]["input_ids"], skip_special_tokens=True)
    assert part == texts[10:20]
    assert torch.equal(again["input"]["pixel_values"], batch["input"]["pixel_values"][10:20])
    other = dataset.batch(BatchKey(4, np.arange(36), 0, 36), 1)["input"]["input_ids"]
    assert found.task.tokenizer.batch_decode(other, skip_special_tokens=True) != texts


def test_new_classes_are_in_no_training_image_but_in_the_test(folder: Path):
    found = bundle(folder, new=["green"])
    assert set(found.dataset("train", train=True).labels().tolist()) == {0, 2}
    assert set(found.dataset("test", train=False).labels().tolist()) == {0, 1, 2}
    assert found.task.new == (1,)
    with pytest.raises(UserError, match=r"class in data\.options\.new.*'gren'.*green"):
        bundle(folder, new=["gren"])


def test_a_test_split_has_each_caption_once(folder: Path):
    dataset = bundle(folder).dataset("test", train=False)
    batches = [dataset.batch(BatchKey(0, np.arange(a, a + 5), 0, 5), 0) for a in (0, 5, 10)]
    assert torch.cat([b["text_label"] for b in batches]).tolist() == [0, 1, 2]


def test_a_joined_data_set_has_ids_and_a_normalisation_of_its_own_mapped_to_the_first(folder: Path, tmp_path: Path):
    for side in ("images", "labels"):
        (tmp_path / "train" / side).mkdir(parents=True)
    draw = np.random.default_rng(1)
    for i in range(4):
        mask = np.zeros((16, 16), np.uint8)
        mask[: 4 * i] = 1
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / "train" / "images" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "train" / "labels" / f"{i}.png")
    also = {"name": f"masks:{tmp_path}", "augment": "plain", "options": {"classes": ["grass", "sky"]}}
    joined, alone = bundle(folder, also=[also]), bundle(folder)
    dataset = joined.dataset("train", train=True)
    assert len(dataset) == len(alone.dataset("train", train=True)) + 3  # a fifth of four is its test split
    texts = {dataset.captions(i)[0] for i in range(36, len(dataset))}
    assert texts <= {"a grass square", "a grass and sky square", "a sky and grass square", "a sky square"} and texts
    assert len(set(dataset.labels().tolist()) & {0, 1, 2}) == 3 and dataset.labels()[36:].min() >= 3
    mixed = dataset.batch(BatchKey(0, np.array([36, 0, 37]), 0, 3), 0)["input"]["pixel_values"]
    plain = alone.dataset("train", train=True).batch(BatchKey(0, np.array([0]), 0, 1), 0)["input"]["pixel_values"]
    assert torch.equal(mixed[1:2], plain)


def test_a_long_text_is_cut_before_its_end_mark_and_counted(folder: Path):
    tokens, long = with_marks(tokenizer("bytes")), "word " * 200
    ids = texts_padded(tokens, [long, "a"], 77)["input_ids"]
    assert ids.shape == (2, 77) and ids[0, -1] == tokens.eos_token_id and ids[0, 0] == tokens.bos_token_id
    assert too_long(tokens, [long, "a"], 77) == 1
    with pytest.warns(UserWarning, match=r"3 of 6 captions .* longer than data\.options\.context 12"):
        bundle(folder, context=12, templates=["{}", "a very long text about {}"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bundle(folder)


# ---- the loss ------------------------------------------------------------------------------------------------------


def unit(rows: int, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_samples_of_one_label_are_right_for_each_other():
    image, text, scale = unit(4), unit(4, seed=1), torch.tensor(10.0)
    label = torch.tensor([0, 1, 0, 2])
    logits = scale * image @ text.T
    rows = [logits[i].log_softmax(0)[label == label[i]].mean() for i in range(4)]
    columns = [logits[:, i].log_softmax(0)[label == label[i]].mean() for i in range(4)]
    expected = -(torch.stack(rows).mean() + torch.stack(columns).mean()) / 2
    torch.testing.assert_close(contrastive_loss(image, text, scale, label), expected)
    distinct = contrastive_loss(image, text, scale, torch.arange(4))
    torch.testing.assert_close(contrastive_loss(image, text, scale), distinct)


def test_the_sigmoid_loss_judges_each_pair_by_itself():
    image, text = unit(3), unit(3, seed=1)
    scale, bias = torch.tensor(5.0), torch.tensor(-2.0)
    z = scale * image @ text.T + bias
    expected = sum(-F.logsigmoid(z[i, j] if i == j else -z[i, j]) for i in range(3) for j in range(3)) / 3
    torch.testing.assert_close(sigmoid_loss(image, text, scale, bias), expected)


def test_a_scale_beyond_all_bounds_gives_a_finite_loss_and_is_put_back(folder: Path):
    found = bundle(folder)
    model = network(found.task)
    teacher = network(found.task, seed=1)
    for net in (model, teacher):
        net.logit_scale.data.fill_(100.0)
    teacher.requires_grad_(False)
    module = Distillation(model, None, [Contrastive()], task=found.task)
    batch = found.dataset("train", train=True).batch(BatchKey(0, np.arange(6), 0, 6), 0)
    module.build(batch)
    loss = module(batch, Progress())["loss"]
    assert loss.isfinite()
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    module.after_step(batch, Progress(), True)
    assert model.logit_scale.item() <= math.log(100) + 1e-6
    found.task.constrain(teacher)
    assert teacher.logit_scale.item() == 100.0


RANKS = """
import sys, torch, torch.distributed as dist
from torch import nn
from stillhouse.functional.gather import gather
from stillhouse.objectives.contrastive import contrastive_loss
from torch.nn import functional as F
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(0)
net, x, label = nn.Linear(5, 4), torch.randn(2, 8, 5), torch.tensor([0, 1, 2, 0, 3, 4, 1, 5])
own = slice(4 * rank, 4 * rank + 4)
image, text = (F.normalize(net(part[own]), dim=-1) for part in x)
loss = contrastive_loss(gather(image), gather(text), torch.tensor(7.0), gather(label[own]))
loss.backward()
dist.all_reduce(net.weight.grad)
if rank == 0:
    print(loss.item(), *(net.weight.grad / 2).flatten().tolist())
"""


def test_two_processes_have_the_loss_and_gradient_of_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    commands = [[sys.executable, "-c", RANKS, str(rank), port] for rank in range(2)]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
    printed = [p.communicate(timeout=120)[0] for p in processes]
    torch.manual_seed(0)
    net, x, label = nn.Linear(5, 4), torch.randn(2, 8, 5), torch.tensor([0, 1, 2, 0, 3, 4, 1, 5])
    image, text = (F.normalize(net(part), dim=-1) for part in x)
    loss = contrastive_loss(image, text, torch.tensor(7.0), label)
    loss.backward()
    found = torch.tensor([float(v) for v in printed[0].split()])
    expected = torch.cat([loss.detach()[None], net.weight.grad.flatten()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ---- figures -------------------------------------------------------------------------------------------------------


def test_recall_counts_the_rank_of_the_nearest_right_answer_and_ties_earn_nothing():
    query = torch.tensor([[1.0, 0.0]])
    angles = torch.linspace(0.1, 1.4, 12)
    candidates = torch.stack([angles.cos(), angles.sin()], 1)
    for place in range(12):
        ids = torch.full((12,), 7)
        ids[place] = 3
        expected = [float(place < r) for r in (1, 5, 10)]
        assert recall(query, candidates, torch.tensor([3]), ids) == expected
    same = torch.ones(12, 2) / math.sqrt(2)
    ids = torch.arange(12)
    assert recall(same[:1], same, torch.tensor([0]), ids) == [0.0, 0.0, 0.0]
    assert recall(query, candidates, torch.tensor([99]), ids) == [0.0, 0.0, 0.0]


def test_base_and_new_classes_are_judged_among_themselves():
    logits = torch.tensor([[1.0, 9, 0, 8], [0, 1, 0, 9], [5, 0, 1, 2], [9, 0, 2, 1]])
    found = base_and_new(logits, torch.tensor([0, 1, 2, 3]), new=[2, 3])
    assert found["accuracy_base"] == 0.5 and found["accuracy_new"] == 0.0
    assert found["accuracy_harmonic"] == 0.0 and harmonic(0.5, 0.25) == pytest.approx(1 / 3)


def test_class_vectors_are_means_of_unit_vectors_over_all_templates(folder: Path):
    task = bundle(folder).task
    model = network(task)
    vectors = task.class_vectors(model, ["red", "dark_blue"])
    texts = ["a dark blue square", "something dark blue"]
    expected = F.normalize(torch.cat([task.embed_texts(model, [t]) for t in texts]).mean(0), dim=0)
    torch.testing.assert_close(vectors[1], expected)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


# ---- a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [CLIP, SIGLIP, TOWERS], ids=["clip", "siglip", "two_towers"])
def test_a_network_learns_colours_by_name_and_its_product_knows_them(
    folder: Path, tmp_path: Path, spec: dict[str, Any]
):
    raw = {
        "data": data(folder),
        "student": spec,
        "objectives": [{"name": "contrastive", "loss": "sigmoid" if spec is SIGLIP else "softmax"}],
        "train": {"epochs": 12, "batch_size": 12, "eval_every": 0, "optimizer": {"name": "adamw", "lr": 1e-2}},
        "evaluate": ["quality"],
    }
    figures = execute(recipe.validate(raw), tmp_path / "run", cpu=True)
    assert figures["accuracy"] > 0.6 and figures["text_to_image_r1"] > 0.5, "a third is chance"
    product = load_product(tmp_path / "run")
    again = judge(product.task, product.module, _test(folder), groups=["zero_shot"])
    assert again["accuracy"] == pytest.approx(figures["accuracy"])
    image = str(folder / "test" / "red" / "0.png")
    assert next(predict(tmp_path / "run", [image], names=["red", "green"])).startswith("0.png: ")
    line = next(predict(tmp_path / "run", [image], tmp_path / "found", texts=["a red square", "a blue square"]))
    assert "a red square" in line and "a blue square" in line
    assert (tmp_path / "run" / "pictures" / "0-student.png").is_file()


def _test(folder: Path) -> Any:
    from stillhouse.data import Loader

    return Loader(bundle(folder).dataset("test", train=False), 4)


def test_a_frozen_encoder_keeps_its_bits_and_its_statistics(folder: Path):
    found = bundle(folder)
    model = network(found.task, TOWERS)
    before = {k: v.clone() for k, v in model.image.state_dict().items()}
    module = Distillation(model, None, [Contrastive()], task=found.task)
    batch = found.dataset("train", train=True).batch(BatchKey(0, np.arange(8), 0, 8), 0)
    module.build(batch)
    module.train()
    module(batch, Progress())["loss"].backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    assert all(torch.equal(before[k], v) for k, v in model.image.state_dict().items())
    assert model.visual_projection.weight.grad.abs().sum() > 0


def test_a_teacher_of_images_and_texts_teaches_a_classifier_by_its_class_names(folder: Path, tmp_path: Path):
    classes = {"name": f"imagefolder:{folder}", "image_size": 16, "augment": "plain"}
    train = {"epochs": 12, "batch_size": 12, "eval_every": 0, "optimizer": {"name": "adamw", "lr": 1e-2}}
    raw = {
        "data": classes,
        "teacher": {**CLIP, "data": data(folder), "train": train},
        "student": {"model": "stillhouse:mlp", "options": {"widths": [16]}},
        "objectives": [{"name": "kd", "temperature": 1}],
        "train": train,
        "evaluate": ["accuracy"],
    }
    figures = execute(recipe.validate(raw), tmp_path / "run", cpu=True)
    assert figures["accuracy"] > 0.6, "no label was seen: a third is chance"


def test_a_distilled_teacher_is_a_stage_that_names_its_own_teacher(folder: Path, tmp_path: Path):
    train = {"epochs": 1, "batch_size": 12, "eval_every": 0, "optimizer": {"name": "adamw", "lr": 1e-3}}
    raw = {
        "data": data(folder),
        "teacher": {**CLIP, "train": train, "objectives": ["contrastive", "rkd"], "teacher": {**CLIP, "train": train}},
        "student": CLIP,
        "objectives": ["rkd"],
        "train": train,
        "evaluate": ["quality"],
    }
    assert execute(recipe.validate(raw), tmp_path / "run", cpu=True)["accuracy"] >= 0
    with pytest.raises(UserError, match="needs `train`"):
        recipe.validate({**raw, "teacher": {**CLIP, "pretrained": True, "objectives": ["rkd"]}})


def test_a_network_of_another_kind_is_refused_by_name(folder: Path):
    task = bundle(folder).task
    with pytest.raises(UserError, match=r"does not embed images and texts"):
        task.build(ModelSpec(model="stillhouse:mlp"))
    with pytest.raises(UserError, match=r"reads at most 8 tokens"):
        text = {**CLIP["options"]["text_config"], "max_position_embeddings": 8}
        network(task, {**CLIP, "options": {**CLIP["options"], "text_config": text}})


# ---- captions of their own -----------------------------------------------------------------------------------------

TEXTS = {"0": ["a red thing", "red, all over"], "1": ["a blue thing"], "2": ["a green thing"], "3": ["nothing much"]}


def _image(i: int) -> Image.Image:
    return Image.fromarray(np.full((16, 20, 3), 40 * i, np.uint8))


@pytest.fixture(params=["csv", "jsonl", "tar"])
def captioned(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Four captioned images for training and two for testing, one of which has two captions."""
    for split, keys in (("train", "0123"), ("test", "01")):
        (tmp_path / split).mkdir()
        if request.param == "tar":
            with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
                for key in keys:
                    buffer = io.BytesIO()
                    _image(int(key)).save(buffer, "PNG")
                    texts = json.dumps({"caption": TEXTS[key]}) if key == "0" else TEXTS[key][0]
                    kind = "json" if key == "0" else "txt"
                    for name, content in ((f"a/{key}.png", buffer.getvalue()), (f"a/{key}.{kind}", texts.encode())):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            continue
        rows = [{"file_name": f"{k}.png", "text": t} for k in keys for t in TEXTS[k]]
        for key in keys:
            _image(int(key)).save(tmp_path / split / f"{key}.png")
        if request.param == "csv":
            lines = ["file_name,text", *(f'{r["file_name"]},"{r["text"]}"' for r in rows)]
            (tmp_path / split / "metadata.csv").write_text("\n".join(lines))
        else:
            (tmp_path / split / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"{'shards' if request.param == 'tar' else 'pairs'}:{tmp_path}"


def test_captions_of_files_are_drawn_in_training_and_all_there_in_evaluation(captioned: str):
    options = {"tokenizer": "bytes", "context": 24, "classes": ["red", "blue"]}
    found = load(DataSpec(name=captioned, image_size=16, augment="plain", options=options))
    train, test = found.dataset("train", train=True), found.dataset("test", train=False)
    assert [list(train.captions(i)) for i in range(4)] == list(TEXTS.values())
    drawn = {found.task.tokenizer.decode(train.batch(BatchKey(e, np.array([0]), 0, 1), 0)["input"]["input_ids"][0],
             skip_special_tokens=True) for e in range(12)}  # fmt: skip
    assert drawn == set(TEXTS["0"])
    batch = test.batch(BatchKey(0, np.arange(2), 0, 2), 0)
    assert len(batch["input"]["input_ids"]) == 3 and batch["input"]["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["text_label"].tolist() == [batch["label"][0], batch["label"][0], batch["label"][1]]
    assert batch["label"].min() >= 2, "a caption is no class"
    assert set(train.labels().tolist()).isdisjoint(test.labels().tolist())
    model = network(found.task)
    figures = judge(found.task, model, [batch], groups=["retrieval"])
    assert set(figures) == {f"{a}_r{r}" for a in ("image_to_text", "text_to_image") for r in (1, 5, 10)}


def test_a_caption_file_that_does_not_fit_says_so(tmp_path: Path):
    with pytest.raises(UserError, match="no table of its images"):
        load(DataSpec(name=f"pairs:{tmp_path}"))
    (tmp_path / "captions.csv").write_text("file_name,note\n0.png,x\n")
    with pytest.raises(UserError, match=r"row 1 .* has no 'text'.*text_column"):
        load(DataSpec(name=f"pairs:{tmp_path}"))
    (tmp_path / "captions.csv").write_text("file_name,text\n0.png,x\n")
    with pytest.raises(UserError, match=r"names the image '0\.png', which is not"):
        load(DataSpec(name=f"pairs:{tmp_path}"))
    with pytest.raises(UserError, match=r"no \.tar files"):
        load(DataSpec(name=f"shards:{tmp_path}"))


@pytest.mark.parametrize("prefix", ["", "text."])
def test_a_recipe_loads_a_clip_of_open_clip(folder: Path, tmp_path: Path, prefix: str):
    task = bundle(folder).task
    half = {"width": 16, "layers": 2, "heads": 2}
    spec = {"model": "stillhouse:clip", "options": {"vision": {**half, "patch": 8}, "text": half, "dim": 12}}
    net = network(task, spec)
    theirs: dict[str, torch.Tensor] = {}
    names = {"first": "class_embedding", "positions": "positional_embedding", "patches.weight": "conv1.weight"}
    names |= {"tokens.weight": "token_embedding.weight"}
    for name, value in net.state_dict().items():
        side, _, rest = name.partition(".")
        head = {"image": "visual.", "text": prefix, "logit_scale": ""}[side]
        if side == "logit_scale":
            theirs["logit_scale"] = value
        elif rest == "projection.weight":
            theirs["visual.proj" if side == "image" else f"{prefix}text_projection"] = value.T.contiguous()
        elif ".attention." in rest and ".out." not in rest:
            start, _, end = rest.partition(".attention.")
            _, _, kind = end.partition(".")
            key = f"{head}transformer.resblocks{start.removeprefix('encoder.layers')}.attn.in_proj_{kind}"
            theirs[key] = torch.cat([theirs[key], value]) if key in theirs else value  # query, key, value
        else:
            norms = {"norm_before": "ln_pre", "norm_after": "ln_post" if side == "image" else "ln_final"}
            for ours, its in [
                ("encoder.layers", "transformer.resblocks"),
                (".attention.out.", ".attn.out_proj."),
                (".norm", ".ln_"),
                (".fc1.", ".mlp.c_fc."),
                (".fc2.", ".mlp.c_proj."),
            ]:
                rest = rest.replace(ours, its)
            start, dot, end = rest.partition(".")
            rest = names.get(rest, f"{norms.get(start, start)}{dot}{end}")
            theirs[f"{head}{rest}"] = value
    torch.save(theirs, tmp_path / "open_clip.pt")
    loaded = network(task, {**spec, "checkpoint": {"path": str(tmp_path / "open_clip.pt"), "rename": "open_clip"}}, 1)
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
