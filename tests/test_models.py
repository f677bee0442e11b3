"""Models by name: the published architectures, other libraries' models, checkpoints that do not fit, stages and the
classifier of any of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.models import anatomy, build, load_weights, names
from stillhouse.signals import Taps, call_model

ORACLES = Path(os.environ.get("STILLHOUSE_ORACLES", Path(__file__).parents[2] / "shared" / "oracles"))

# Millions of parameters with 100 classes at 32 px, as CRD (arXiv 1910.10699) and its code give them.
PUBLISHED = {
    "resnet8x4": 1.23,
    "resnet20": 0.28,
    "resnet32": 0.47,
    "resnet32x4": 7.43,
    "resnet50": 23.71,
    "resnet56": 0.86,
    "resnet110": 1.74,
    "wrn_16_2": 0.70,
    "wrn_40_1": 0.57,
    "wrn_40_2": 2.26,
    "vgg8": 3.97,
    "vgg13": 9.46,
    "mobilenet_v2": 0.81,
    "shufflenet_v1": 0.95,
    "shufflenet_v2": 1.36,
    "efficientnet_b0": 4.14,  # as torchvision's
    "densenet121": 7.05,
}
SMALL = {
    "vit": {"dim": 24, "depth": 4},
    "mixer": {"dim": 24, "depth": 4},
    "resnet_stages": {"stem": 8, "widths": [8, 16, 16], "depths": [1, 2, 1]},
}
VISION = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}


def make(
    name: str, classes: int | None = 7, shape: tuple[int, ...] | None = (3, 32, 32), **options: object
) -> nn.Module:
    torch.manual_seed(0)
    return build(ModelSpec(model=name, options=options), classes, shape)


DETECTORS = {"one_stage", "pyramid_detector", "yolov4", "point_pillars", "second", "point_rcnn"}  # see their own tests
REGIONS = {"faster_rcnn", "mask_rcnn", "text_rcnn"}  # see test_dynamic_ykd.py, test_oadp.py
SEGMENTERS = {"pyramid_segmenter"}  # see test_mgd_ssss.py
RESTORERS = {"imdn", "imdn_as", "imdn_rtc", "imdn_rte"}  # see test_imdn.py
PAIRED = {"clip", "hybrid_clip", "two_towers", "fusion", "visual_language"}  # see test_image_text.py, test_albef.py
DENOISERS = {"dit"}  # see test_diffusion.py
OTHERS = DETECTORS | REGIONS | SEGMENTERS | RESTORERS | PAIRED | DENOISERS


@pytest.mark.parametrize("name", [n for n in names() if n not in OTHERS])
def test_every_own_net_learns_from_a_batch(name: str) -> None:
    if name == "wrn_28_10":
        name = "wrn_10_1"  # the same class by its pattern, at a size that two cores run in a test
    model = make(f"stillhouse:{name}", **SMALL.get(name, {}))
    taps = Taps(model, anatomy.stages(model))
    with taps.capture() as got:
        logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.tensor([1, 5])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(t.requires_grad for t in got.values())
    batch = {"input": torch.randn(2, 3, 32, 32)}
    assert anatomy.classifier(model, batch) == ("head" if name in ("vit", "mixer", "conv_vit") else "fc")
    assert anatomy.num_outputs(model, batch) == 7


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = make(f"stillhouse:{name}", classes=100)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [
        ("shufflenet_v1", {"groups": 2}, 0.89),
        ("shufflenet_v2", {"size": 0.5}, 0.35),
        ("mobilenet_v2", {"width": 1.0, "stem_stride": 1}, 2.24),
        ("efficientnet_b0", {}, 4.02),
        ("densenet121", {}, 6.96),
    ],
)
def test_nets_of_small_images_have_statistics_to_the_last_norm(
    name: str, options: dict[str, object], millions: float
) -> None:
    model = make(f"stillhouse:{name}", 10, **options).eval()
    maps: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, given: maps.append(given[0].shape[-1]))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert min(maps) >= 2 and round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def test_sizes_that_a_shufflenet_does_not_have_are_refused() -> None:
    with pytest.raises(UserError, match="groups of shufflenet_v1 must be 1, 2 or 3; given: 4"):
        make("stillhouse:shufflenet_v1", groups=4)
    with pytest.raises(UserError, match=r"size of shufflenet_v2 must be 0\.5, 1 or 1\.5; given: 3"):
        make("stillhouse:shufflenet_v2", size=3)


def test_the_digits_fit_every_kind_of_own_net() -> None:
    x = torch.randn(2, 1, 8, 8)
    for name, options in [
        ("resnet8", {}),
        ("wrn_16_1", {}),
        ("vgg8", {}),
        ("mobilenet_v2", {}),
        ("shufflenet_v2", {}),
        ("convnet2", {"width": 8}),
    ]:
        assert make(f"stillhouse:{name}", shape=(1, 8, 8), **options)(x).shape == (2, 7)
    for name in ("vit", "mixer"):
        assert make(f"stillhouse:{name}", shape=(1, 8, 8), patch=2, dim=24, depth=2)(x).shape == (2, 7)
    assert make("stillhouse:mlp", shape=(1, 8, 8), widths=[8])(x).shape == (2, 7)
    assert make("stillhouse:mlp", shape=(64,), widths=[])(torch.randn(2, 64)).shape == (2, 7)


@pytest.mark.parametrize("case", ["dataset_distillation_common/convnet_in_d3.npz"])
def test_the_convnet_computes_what_the_published_one_does(case: str) -> None:
    if not (ORACLES / case).is_file():
        pytest.skip(f"no oracle {case}")
    oracle = np.load(ORACLES / case)
    params = json.loads(str(oracle["params"]))
    model = make(
        "stillhouse:convnet", params["num_classes"], oracle["x"].shape[1:], width=params["width"], depth=params["depth"]
    )
    weights = {k[2:]: torch.tensor(v) for k, v in oracle.items() if k.startswith("w:")}
    parts = {0: "conv", 1: "norm"}
    ours = {}
    for key, value in weights.items():
        module, *rest = key.split(".")
        index = int(rest[0]) if module == "features" else 0
        ours[f"layer{index // 4 + 1}.{parts[index % 4]}.{rest[1]}" if module == "features" else f"fc.{rest[0]}"] = value
    model.load_state_dict(ours)
    x = torch.tensor(oracle["x"], requires_grad=True)
    logits = model(x)
    loss = F.cross_entropy(logits, torch.tensor(oracle["labels"]).long())
    loss.backward()
    for given, name in ((model.embed(x), "feat"), (logits, "logits"), (loss, "ce"), (x.grad, "grad:x")):
        np.testing.assert_allclose(given.detach().numpy(), oracle[name], rtol=1e-5, atol=1e-6)


def test_taps_are_not_changed_in_place_by_the_layers_after_them() -> None:
    for name in ("resnet8", "wrn_10_1", "vgg8", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2", "convnet3"):
        model = make(f"stillhouse:{name}").eval()
        changed = _changed_outputs(model, torch.randn(2, 3, 32, 32))
        assert not changed, f"{name}: {changed}"
    in_place = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    assert _changed_outputs(in_place, torch.randn(2, 4)) == ["0"]


def _changed_outputs(model: nn.Module, x: torch.Tensor) -> list[str]:
    kept: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, n=name: kept.append((n, out, out.clone())))
    model(x)
    return [name for name, out, copy in kept if not torch.equal(out, copy)]


@pytest.mark.parametrize(
    ("name", "options", "head", "embedding", "stages"),
    [
        ("timm:resnet18", {"channels": [8, 16, 24, 32]}, "fc", 32, "layer1 layer2 layer3 layer4"),
        ("timm:vit_tiny_patch16_224", {"embed_dim": 24, "depth": 8}, "head", 24, "blocks.1 blocks.3 blocks.5 blocks.7"),
        (
            "timm:deit_tiny_distilled_patch16_224",
            {"embed_dim": 24, "depth": 4},
            "head_dist",
            24,
            "blocks.0 blocks.1 blocks.2 blocks.3",
        ),
        ("timm:mixer_s32_224", {}, "head", 512, "blocks.1 blocks.3 blocks.5 blocks.7"),
        ("timm:convnext_atto", {"dims": [8, 8, 8, 16]}, "head.fc", 16, "stages.0 stages.1 stages.2 stages.3"),
        ("timm:efficientnet_lite0", {}, "classifier", 1280, "blocks.1 blocks.2 blocks.4 blocks.6"),
        ("timm:mobilenetv3_small_050", {}, "classifier", 1024, "blocks.0 blocks.1 blocks.3 blocks.5"),
        (
            "timm:swin_tiny_patch4_window7_224",
            {"embed_dim": 12, "depths": [1, 1, 1, 1], "window_size": 2},
            "head.fc",
            96,
            "layers.0 layers.1 layers.2 layers.3",
        ),
        ("torchvision:resnet18", {}, "fc", 512, "layer1 layer2 layer3 layer4"),
        ("torchvision:squeezenet1_1", {}, "classifier.1", 512, "features.1 features.4 features.7 features.12"),
        (
            "torchvision:mobilenet_v2",
            {"width_mult": 0.25},
            "classifier.1",
            1280,
            "features.3 features.6 features.13 features.18",
        ),
        ("torchvision:shufflenet_v2_x0_5", {}, "fc", 1024, "stage2 stage3 stage4"),
    ],
)
def test_stages_and_classifier_are_found(name: str, options: dict, head: str, embedding: int, stages: str) -> None:
    model = make(name, classes=5, shape=(3, 64, 64), **options)
    _check_anatomy(model, {"input": torch.randn(2, 3, 64, 64)}, head, embedding, stages, 5)


@pytest.mark.parametrize(
    ("kind", "options", "head", "embedding", "stages"),
    [
        ("vit", {**VISION, "patch_size": 8}, "classifier", 16, None),
        (
            "resnet",
            {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"},
            "classifier.1",
            16,
            None,
        ),
        (
            "bert",
            {**VISION, "task": "text", "vocab_size": 60},
            "classifier",
            16,
            "bert.encoder.layer.0 bert.encoder.layer.1 bert.encoder.layer.2 bert.encoder.layer.3",
        ),
        (
            "gpt2",
            {
                "task": "causal",
                "n_embd": 16,
                "n_layer": 2,
                "n_head": 2,
                "vocab_size": 60,
                "bos_token_id": 1,
                "eos_token_id": 1,
            },
            "lm_head",
            16,
            None,
        ),
    ],
)
def test_transformers_are_built_from_a_config_and_understood(
    kind: str, options: dict, head: str, embedding: int, stages: str | None
) -> None:
    pytest.importorskip("transformers")
    task = options.get("task", "image")
    model = make(f"hf:config:{kind}", 5, (1, 32, 32) if task == "image" else None, **options)
    tokens = {"input_ids": torch.randint(3, 50, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    batch = {"input": torch.randn(2, 1, 32, 32) if task == "image" else tokens}
    _check_anatomy(
        model, batch, head, embedding, stages or " ".join(anatomy.stages(model)), 60 if task == "causal" else 5
    )


def _check_anatomy(model: nn.Module, batch: dict, head: str, embedding: int, stages: str, classes: int) -> None:
    model.train()
    frozen = next(m for m in model.modules() if m is not model)
    frozen.eval()
    assert anatomy.classifier(model, batch) == head
    assert anatomy.num_outputs(model, batch) == classes
    assert model.training and not frozen.training
    assert " ".join(anatomy.stages(model)) == stages
    with torch.no_grad(), (taps := Taps(model.eval(), [*anatomy.stages(model), f"{head}:in"])).capture() as got:
        call_model(model, batch)
    taps.remove()
    assert anatomy.embedding_from(got[f"{head}:in"]).shape == (2, embedding)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_without_a_linear_classifier_asks_for_the_embedding() -> None:
    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 7)
            self.norm = nn.LayerNorm(7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.body(x))

    with pytest.raises(UserError, match="`embedding:`"):
        anatomy.classifier(Prototypes(), {"input": torch.randn(2, 4)})
    with pytest.raises(UserError, match="name the taps"):
        anatomy.stages(Prototypes())
    with pytest.raises(UserError, match=r"could not run on an input of shape \(2, 5\)"):
        anatomy.num_outputs(Prototypes(), {"input": torch.randn(2, 5)})


def test_a_plain_sequential_has_stages_where_its_resolution_falls() -> None:
    conv = lambda i, o, s: nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.ReLU())  # noqa: E731
    net = nn.Sequential(
        conv(3, 4, 1),
        conv(4, 4, 1),
        conv(4, 8, 2),
        conv(8, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    assert anatomy.stages(net) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20", {}, "did you mean 'stillhouse:resnet20'"),
        ("tim:resnet18", {}, "stillhouse:…, timm:…, torchvision:…, hf:…, file:…"),
        ("stillhouse:resnet21", {}, "or 'stillhouse:resnet20'"),
        ("stillhouse:wrn_17_2", {}, "depth D = 6n\\+4"),
        ("timm:resnet19", {}, "did you mean 'timm:resnet1"),
        ("torchvision:resnet19", {}, "did you mean 'torchvision:resnet18'"),
        ("stillhouse:convnet3", {"wdth": 4}, "'options.wdth' of 'stillhouse:convnet3'; did you mean 'options.width'"),
        ("stillhouse:convnet3", {"depth": 4}, "options.depth: 'stillhouse:convnet3' fixes depth to 3"),
        ("stillhouse:convnet3", {"norm": "instnce"}, "did you mean 'instance'"),
        ("stillhouse:convnet3", {"width": "wide"}, "Could not build 'stillhouse:convnet3' with options"),
        ("stillhouse:convnet7", {}, "too deep for images of 32 x 32"),
        ("stillhouse:vit", {"patch": 5}, "do not divide an image of 32 x 32"),
        ("stillhouse:vit", {"dim": 32}, "3 heads do not divide options.dim 32"),
        ("timm:resnet18", {"foo": 1}, "takes no options.foo"),
        ("timm:mixer_s32_224", {"embed_dim": 8}, "options.embed_dim: 'timm:mixer_s32_224' fixes it by its name"),
        ("torchvision:resnet18", {"foo": 1}, "takes no options.foo"),
        ("file:net.py", {}, "file:PATH.py:CLASS"),
        ("file:nowhere/net.py:Net", {}, "There is no file 'nowhere/net.py'"),
        ("hf:nowhere", {}, "no folder with a config.json"),
        ("hf:config:vitt", {}, "did you mean 'hf:config:vit"),
        ("hf:config:vit", {"hidden_sise": 8}, "did you mean 'options.hidden_size'"),
        ("hf:config:bert", {}, "no model for options.task 'image'; it has: text, causal"),
        ("hf:config:bert", {"task": "txt"}, "did you mean 'text'"),
    ],
)
def test_a_wrong_name_or_option_gets_a_sentence(name: str, options: dict, message: str) -> None:
    if name.startswith("hf:"):
        pytest.importorskip("transformers")
    with pytest.raises(UserError, match=message):
        make(name, **options)


def test_wrong_data_or_weights_for_a_library_get_a_sentence() -> None:
    with pytest.raises(UserError, match="take 3 channels, but the data has 1"):
        make("torchvision:resnet18", shape=(1, 32, 32))
    with pytest.raises(UserError, match="no published weights"):
        build(ModelSpec(model="stillhouse:resnet8", pretrained=True), 10)
    with pytest.raises(UserError, match="input_shape"):
        make("stillhouse:mlp", shape=None)


def test_a_class_in_a_file_is_a_model(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\nclass Net(nn.Linear):\n    def __init__(self, num_classes, width=4):\n        "
        "super().__init__(width, num_classes)\n"
    )
    model = make(f"file:{file}:Net", width=6)
    assert (model.in_features, model.out_features) == (6, 7)
    assert type(make(f"file:{file}:Net")) is type(model)
    with pytest.raises(UserError, match="did you mean 'Net'"):
        make(f"file:{file}:Nett")
    with pytest.raises(UserError, match=r"did you mean 'options\.width'"):
        make(f"file:{file}:Net", widht=6)
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match="ModuleNotFoundError"):
        make(f"file:{file}:Net")
    file.write_text("def Net():\n    return 3\n")
    with pytest.raises(UserError, match="returned a int"):
        make(f"file:{file}:Net")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    ],
)
def test_checkpoints_load_whatever_wraps_them(tmp_path: Path, wrap) -> None:
    source = make("stillhouse:resnet8")
    torch.save(wrap(source.state_dict()), tmp_path / "net.pth")
    model = build(ModelSpec(model="stillhouse:resnet8", checkpoint=str(tmp_path / "net.pth")), 7)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


def test_published_names_of_cifar_checkpoints_are_understood(tmp_path: Path) -> None:
    source = make("stillhouse:wrn_16_1")
    published = {}
    for name, value in source.state_dict().items():
        if name.startswith("layer"):
            stage, rest = name[5], name[7:]
            name = f"block{stage}.layer.{rest.replace('.shortcut.', '.convShortcut.')}"
        published[name] = value
    save_file(published, tmp_path / "wrn.safetensors")
    model = make("stillhouse:wrn_16_1")
    nn.init.zeros_(model.conv1.weight)
    load_weights(model, tmp_path / "wrn.safetensors")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), source.eval()(x))


def test_a_checkpoint_that_does_not_fit_leaves_the_model_and_gets_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    model = make("stillhouse:resnet8")
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def refuses(message: str, file: Path = path) -> None:
        with pytest.raises(UserError, match=message):
            load_weights(model, file, owner="student")
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    torch.save(make("stillhouse:resnet8", classes=9).state_dict(), path)
    refuses(
        r"54 of its 56 tensors match; the first that differs is 'fc\.weight': \(9, 64\) in the checkpoint, \(7, 64\) "
        r"in the student"
    )
    torch.save(make("stillhouse:resnet14").state_dict(), path)
    refuses(r"56 of its 56 tensors match; the model has no 'layer1\.1\.conv1\.weight'")
    torch.save({k: v for k, v in before.items() if k != "bn1.weight"}, path)
    refuses(r"55 of its 56 tensors match; the checkpoint lacks 'bn1\.weight'")
    torch.save({"optimizer": {"lr": 0.1}}, path)
    refuses("holds no state dict .* but the keys optimizer")
    torch.save({"model": model}, path)
    refuses("Python objects besides tensors")
    path.write_bytes(b"\x00garbage")
    refuses("not a readable torch file")
    (tmp_path / "net.safetensors").write_bytes(b"\x00garbage")
    refuses("no readable safetensors file", tmp_path / "net.safetensors")
    refuses("does not exist; did you mean '.*net.pth'", tmp_path / "nett.pth")


def test_names_are_renamed_as_the_recipe_says_and_the_message_gives_the_rule(tmp_path: Path) -> None:
    source, path = make("stillhouse:resnet8"), tmp_path / "theirs.safetensors"
    save_file({f"net.backbone.{k}": v for k, v in source.state_dict().items()}, path)
    spec = {"model": "stillhouse:resnet8", "checkpoint": {"path": str(path)}}
    with pytest.raises(UserError, match=r"lacks 'conv1\.weight'.* rename: ") as refused:
        build(ModelSpec.model_validate(spec), 7)
    rule = yaml.safe_load(str(refused.value).rpartition("rename: ")[2].removesuffix("}."))
    assert rule == [[r"^net\.backbone\.", ""]]
    spec["checkpoint"]["rename"] = rule
    model = build(ModelSpec.model_validate(spec), 7)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    for wrong, message in [
        (["^encoder", ""], "matches no name of .*, whose names are such as 'net.backbone."),
        (["(", ""], "no valid rule"),
        ([r"\d", ""], "gives two tensors of .* the name"),
    ]:
        spec["checkpoint"]["rename"] = [wrong]
        with pytest.raises(UserError, match=message):
            build(ModelSpec.model_validate(spec), 7)


def test_a_name_of_another_implementation_is_met_by_the_nearest_of_its_shape(tmp_path: Path) -> None:
    state = make("stillhouse:resnet8").state_dict()
    save_file({k.replace("bn1", "norm1"): v for k, v in state.items()}, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match=r"nearest to 'bn1.weight' is the checkpoint's 'norm1.\w+'"):
        load_weights(make("stillhouse:resnet8"), tmp_path / "net.safetensors")


@pytest.mark.parametrize("name", ["stillhouse:resnet8", "timm:mobilenetv3_small_050", "torchvision:mobilenet_v3_small"])
@pytest.mark.parametrize("headless", [False, True])
def test_a_network_that_is_trained_gets_a_new_classifier_where_only_that_differs(
    tmp_path: Path, name: str, headless: bool
) -> None:
    source, path = make(name, classes=9), tmp_path / "net.safetensors"
    state = source.state_dict()
    last = [k for k in state if state[k].shape[:1] == (9,)]
    save_file({k: v for k, v in state.items() if not (headless and k in last)}, path)
    spec = ModelSpec(model=name, checkpoint=str(path))
    with pytest.raises(UserError, match="Only the classifier"):
        build(spec.with_classifier("same"), 7)
    model = build(spec.with_classifier("new"), 7)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k not in last)
    assert {model.state_dict()[k].shape[0] for k in last} == {7}


def test_a_new_classifier_excuses_no_other_difference(tmp_path: Path) -> None:
    state = make("stillhouse:resnet8", classes=9).state_dict()
    for name, value in [("conv1.weight", torch.zeros(8, 3, 3, 3)), ("layer2.0.bn1.weight", None)]:
        changed = {**state, name: value} if value is not None else {k: v for k, v in state.items() if k != name}
        save_file(changed, tmp_path / "net.safetensors")
        with pytest.raises(UserError, match="does not fit"):
            load_weights(make("stillhouse:resnet8"), tmp_path / "net.safetensors", new_classifier=True)


def test_a_file_cut_off_gets_a_sentence(tmp_path: Path) -> None:
    model = make("stillhouse:resnet8")
    torch.save(model.state_dict(), tmp_path / "net.pth")
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    for file in (tmp_path / "net.pth", tmp_path / "net.safetensors"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(UserError, match="incomplete or corrupt"):
            load_weights(model, file)


def test_tied_weights_need_to_be_in_the_file_only_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    save_file({"embed.weight": torch.ones(5, 3)}, tmp_path / "tied.safetensors")
    model = Tied()
    load_weights(model, tmp_path / "tied.safetensors")
    assert model.head.weight.eq(1).all()


def test_a_transformers_folder_loads_with_its_weights(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = make("hf:config:vit", 5, (3, 16, 16), **VISION, patch_size=8)
    source.save_pretrained(tmp_path)
    model = make(f"hf:{tmp_path}", 5)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.eval()(x).logits, source.eval()(x).logits)
    with pytest.raises(UserError, match=r"'classifier.bias' is \(5,\) in its file, \(6,\) in the model"):
        make(f"hf:{tmp_path}", 6)
    save_file({"unrelated": torch.ones(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="another architecture"):
        make(f"hf:{tmp_path}", 5)
    (tmp_path / "model.safetensors").unlink()
    assert make(f"hf:{tmp_path}", 6)(x).logits.shape == (2, 6)


def test_building_an_own_net_loads_no_other_library() -> None:
    code = (
        "import sys; from stillhouse.models import build; from stillhouse.runs.recipe import ModelSpec; "
        "build(ModelSpec(model='stillhouse:resnet8')); print([m for m in ('timm', 'torchvision', 'transformers') if "
        "m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
