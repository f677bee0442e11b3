"""Maps of every network have their channels second, and tokens fold to the grid of the image that the network saw, or
are refused."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from stillhouse import Distillation, Progress, Signals, catalog
from stillhouse.distillation.teachers import Reader
from stillhouse.errors import UserError
from stillhouse.functional.feature_maps import Grid, as_map, grid_of, map_tap, pooled, pooled_tap
from stillhouse.models.anatomy import embedding_from, stages

SMALL = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "num_classes": 5, "window_size": 2}


def swin(size: int | tuple[int, int] = 64, **options: object) -> nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=size, **{**SMALL, **options})


def convnext(**options: object) -> nn.Module:
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5, **options)


NETS = {
    "timm swin": (swin, (64, 64), [24, 48, 96, 192]),
    "timm swin, wide": (lambda: swin((64, 96)), (64, 96), [24, 48, 96, 192]),
    "timm swin, as many channels as pixels": (
        lambda: swin(32, embed_dim=8, num_heads=(1, 2, 2, 2)),
        (32, 32),
        [8, 16, 32, 64],
    ),
    "timm convnext": (convnext, (64, 64), [8, 16, 24, 32]),
    "timm convnext, wide": (convnext, (64, 96), [8, 16, 24, 32]),
    "timm convnext by linear layers": (lambda: convnext(conv_mlp=False), (64, 64), [8, 16, 24, 32]),
    "torchvision swin": (
        lambda: torchvision.models.swin_transformer.SwinTransformer(
            [4, 4], 24, [1, 1, 1, 1], [1, 2, 3, 4], [4, 4], num_classes=5
        ),
        (64, 64),
        [24, 48, 96, 192],
    ),
    "resnet": (lambda: timm.create_model("resnet10t", num_classes=5), (64, 32), [64, 128, 256, 512]),
}


def read(model: nn.Module, size: tuple[int, int], *layers: str) -> tuple[Signals, Tensor]:
    x = torch.randn(2, 3, *size)
    reader = Reader(model.eval(), "student")
    reader.attach({f"tap:{layer}" for layer in layers} | {"embedding"}, {"input": x})
    with torch.no_grad():
        return reader({"input": x}), x


@pytest.mark.parametrize("name", NETS)
def test_stages_are_maps_with_their_channels_second(name: str) -> None:
    make, (height, width), channels = NETS[name]
    torch.manual_seed(0)
    model = make()
    layers = [f"stage:{i + 1}" for i in range(4)]
    signals, _ = read(model, (height, width), *layers)
    for i, layer in enumerate(layers):
        assert map_tap(signals, layer).shape == (2, channels[i], height >> (i + 2), width >> (i + 2))
        assert pooled_tap(signals, layer).shape == (2, channels[i])
    assert signals.embedding is not None and signals.embedding.shape == (2, channels[-1])


def test_a_swins_map_holds_the_values_of_its_own_places() -> None:
    torch.manual_seed(0)
    model = swin()
    signals, x = read(model, (64, 64), "stage:-1", "layers.1.blocks.0.norm1:in", "layers.1.downsample.reduction")
    with torch.no_grad():
        features = model.forward_features(x)  # (B, H, W, C), after the last norm
    torch.testing.assert_close(model.norm(signals.taps["stage:-1"].movedim(1, -1)), features)
    torch.testing.assert_close(pooled_tap(signals, "stage:-1"), signals.taps["stage:-1"].mean((2, 3)))
    assert signals.taps["layers.1.blocks.0.norm1:in"].shape == (2, 48, 8, 8)
    assert signals.taps["layers.1.downsample.reduction"].shape == (2, 48, 8, 8)


@pytest.mark.parametrize("name", ["fitnet", "at", "nst", "vid", "review_kd", "acam_kd", "uskd"])
@pytest.mark.parametrize("student", ["timm swin", "timm convnext"])
def test_feature_objectives_train_these_networks(name: str, student: str) -> None:
    torch.manual_seed(0)
    batch = {"input": torch.randn(4, 3, 64, 64), "label": torch.arange(4)}
    other = "timm convnext" if student == "timm swin" else "timm swin"
    module = Distillation(NETS[student][0](), NETS[other][0](), [catalog.objective(name)()]).build(batch)
    module.train()
    loss = module(batch, Progress(epoch=3, epochs=10))["loss"]
    loss.backward()
    assert loss.isfinite() and next(module.student.parameters()).grad.abs().sum() > 0
    if name == "fitnet":
        assert module.objectives[0].regressor.weight.shape[:2] == (NETS[other][2][1], NETS[student][2][1])
    if name == "uskd":
        assert module.objectives[0].weak.in_features == NETS[student][2][2]


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "image", "grid"),
    [
        (45 * 60, (180, 240), Grid(0, 45, 60)),
        (16 * 36, (256, 576), Grid(0, 16, 36)),
        (24 * 24, (384, 384), Grid(0, 24, 24)),
        (197, (224, 224), Grid(1, 14, 14)),
        (201, (224, 224), Grid(5, 14, 14)),
        (9, (8, 8), Grid(5, 2, 2)),
        (12 * 17, (190, 270), Grid(0, 12, 17)),
        (11 * 16, (190, 270), Grid(0, 11, 16)),
        (577, None, Grid(1, 24, 24)),
        (12, (32, 32), None),
        (2700, None, None),
    ],
    ids=str,
)
def test_tokens_lie_in_the_grid_of_their_image(length: int, image: tuple[int, int] | None, grid: Grid | None) -> None:
    assert grid_of(length, image) == grid


def test_a_wide_grid_folds_row_by_row_and_an_unknown_one_is_refused() -> None:
    x = torch.randn(2, 576, 3)
    folded = as_map(x, (256, 576))
    assert folded.shape == (2, 3, 16, 36)
    torch.testing.assert_close(folded[1, :, 2, 5], x[1, 2 * 36 + 5])
    with pytest.raises(UserError, match="a grid of patches of an image of 224 x 224 pixels"):
        as_map(x[:, :575], (224, 224))


def test_tokens_without_a_class_token_are_averaged() -> None:
    x = torch.randn(2, 16, 3)
    torch.testing.assert_close(pooled(x, (32, 32)), x.mean(1))
    torch.testing.assert_close(pooled(torch.cat([x[:, :1], x], 1), (32, 32)), x[:, 0])


@pytest.mark.parametrize("name", ["at", "fitnet"])
def test_a_transformer_on_wide_images_follows_a_convolutional_teacher(name: str) -> None:
    torch.manual_seed(0)
    student = timm.create_model(
        "vit_tiny_patch16_224", img_size=(64, 144), patch_size=4, embed_dim=24, num_heads=2, depth=4, num_classes=5
    )
    batch = {"input": torch.randn(2, 3, 64, 144), "label": torch.arange(2)}  # 16 x 36 patches, as many as 24 x 24
    module = Distillation(student, convnext(), [name]).build(batch)
    module(batch, Progress())["loss"].backward()
    signals = module._reader(batch)
    assert map_tap(signals, next(iter(signals.taps))).shape == (2, 24, 16, 36)


def test_an_embedding_of_a_map_is_averaged_over_its_places() -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.fc = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.patch(x).movedim(1, -1)).mean((1, 2))

    model = Pixels()
    x = torch.randn(2, 3, 16, 16)
    reader = Reader(model, "student", "fc")
    reader.attach({"embedding"}, {"input": x})
    torch.testing.assert_close(reader({"input": x}).embedding, model.patch(x).mean((2, 3)))
    assert embedding_from(torch.ones(2, 6, 4, 4)).shape == (2, 6)


def test_stages_of_timm_are_found() -> None:
    assert stages(swin()) == [f"layers.{i}" for i in range(4)]
