"""TinyCLIP: affinities, what is inherited, masks that reach their target and fold exactly, steps of compression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.methods.image_text.tinyclip.inheritance import fold, inherit
from stillhouse.methods.image_text.tinyclip.masks import MaskLogits, Ramp, Sparsity, prunable, settled
from stillhouse.methods.image_text.tinyclip.method import MaskedClip, affinity_losses, mimicking_loss
from stillhouse.models.clip import Clip, from_transformers, renamed_from_openai
from stillhouse.nn.clip import Masks
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.signals import Signals

SHAPE = (3, 16, 16)
IDS = torch.tensor([[1, 5, 6, 9, 0], [1, 7, 9, 0, 0]])
INSIDE = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])


def clip(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, seed: int = 0) -> Clip:
    torch.manual_seed(seed)
    vision = {"width": 24, "layers": 3, "heads": 3, "patch": 8, **(vision or {})}
    return Clip(vision, {"width": 16, "layers": 2, "heads": 2, **(text or {})}, 8, 12, 6, input_shape=SHAPE).eval()


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(5))


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---- affinities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 5, 9])
def test_a_student_with_the_teachers_affinities_has_its_entropy_as_loss_and_no_gradient(rows: int):
    image, text = unit(rows, 6, 0).requires_grad_(), unit(rows, 6, 1).requires_grad_()
    found = affinity_losses(image, text, image.detach(), text.detach())
    p = (50 * image @ text.T).detach()
    entropies = [-(z.softmax(1) * z.log_softmax(1)).sum(1).mean() for z in (p, p.T)]
    torch.testing.assert_close(torch.stack(found), torch.stack(entropies))
    sum(found).backward()
    assert image.grad is not None and image.grad.abs().max() < 1e-5


def test_equal_captions_and_other_widths_are_no_trouble_but_one_pair_is():
    image, text = unit(4, 6, 0), unit(1, 6, 1).expand(4, -1)
    loss = mimicking_loss(image, text, unit(4, 9, 2), unit(1, 9, 3).expand(4, -1), alpha=0.5)
    assert loss["loss"].isfinite() and torch.equal(loss["loss"], 0.5 * loss["soft"] + 0.5 * loss["hard"])
    with pytest.raises(UserError, match="two pairs"):
        affinity_losses(image[:1], text[:1], image[:1], text[:1])


# ---- inheritance ---------------------------------------------------------------------------------------------------


def test_a_clip_of_transformers_has_the_same_outputs_in_our_form():
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"patch_size": 8, "image_size": 16, "hidden_act": "quick_gelu"}
    text = {**vision, "vocab_size": 12, "max_position_embeddings": 6, "eos_token_id": 9, "bos_token_id": 1}
    theirs = CLIPModel(CLIPConfig(projection_dim=8, vision_config={**vision, **sizes}, text_config=text)).eval()
    ours = from_transformers(theirs)
    torch.testing.assert_close(ours.get_image_features(images()), theirs.get_image_features(images()).pooler_output)
    expected = theirs.get_text_features(IDS, attention_mask=INSIDE).pooler_output
    torch.testing.assert_close(ours.get_text_features(IDS, INSIDE), expected)
    again = Clip(**ours.options, input_shape=SHAPE)
    again.load_state_dict(ours.state_dict())


def test_names_of_openai_are_understood():
    net = clip()
    state: dict[str, torch.Tensor] = {}
    for name, value in net.state_dict().items():
        if ".attention.query." in name:
            layer, _, kind = name.partition(".attention.query.")
            joined = torch.cat([net.state_dict()[f"{layer}.attention.{n}.{kind}"] for n in ("query", "key", "value")])
            state[_openai(f"{layer}.attn.in_proj_{kind}")] = joined
        elif ".attention.key." not in name and ".attention.value." not in name:
            state[_openai(name)] = value.T if "projection" in name else value
    found = renamed_from_openai(state)
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[k], v) for k, v in net.state_dict().items())


def _openai(name: str) -> str:
    for old, new in {
        "image.first": "visual.class_embedding", "image.patches": "visual.conv1",
        "image.positions": "visual.positional_embedding", "image.norm_before": "visual.ln_pre",
        "image.norm_after": "visual.ln_post", "image.projection.weight": "visual.proj",
        "image.encoder.layers": "visual.transformer.resblocks", "text.tokens": "token_embedding",
        "text.positions": "positional_embedding", "text.norm_after": "ln_final",
        "text.projection.weight": "text_projection", "text.encoder.layers": "transformer.resblocks",
        ".norm": ".ln_", ".fc1": ".mlp.c_fc", ".fc2": ".mlp.c_proj", ".attention.out": ".attn.out_proj",
    }.items():  # fmt: skip
        name = name.replace(old, new)
    return name


def test_inheriting_at_equal_shape_is_a_copy_and_what_cannot_be_is_refused():
    large, same = clip(), clip(seed=1)
    inherit(same, large)
    assert all(torch.equal(v, large.state_dict()[k]) for k, v in same.state_dict().items())
    small = clip({"width": 16, "layers": 1, "heads": 2}, {"width": 8, "layers": 1, "heads": 1})
    inherit(small, large)
    query = large.image.encoder.layers[0].attention.query.weight
    assert torch.equal(small.image.encoder.layers[0].attention.query.weight, query[:16, :16])
    with pytest.raises(UserError, match="a head of the student's image transformer has 12 channels"):
        inherit(clip({"heads": 2}), large)
    with pytest.raises(UserError, match="more than the 3"):
        inherit(clip({"layers": 4}), large)
    with pytest.raises(UserError, match="larger than"):
        inherit(clip({"width": 32, "heads": 4}), large)


# ---- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_what_masks_leave_has_the_masked_networks_outputs_even_without_a_head_or_a_unit(seed: int):
    net, draw = clip(), torch.Generator().manual_seed(seed)
    masks = {}
    for name, encoder in net.encoders.items():
        shape = encoder.shape
        sizes = [(shape.width,), *((h,) for h in shape.heads), *((m,) for m in shape.hidden)]
        z = [torch.rand(s, generator=draw) * (torch.rand(s, generator=draw) > 0.4) for s in sizes]
        z[0][0] = 0.7
        if seed == 3:
            z[1], z[-1] = torch.zeros_like(z[1]), torch.zeros_like(z[-1])
        masks[name] = Masks(z[0], z[1 : 1 + len(shape.heads)], z[1 + len(shape.heads) :])
    small = fold(net, masks, SHAPE)
    torch.testing.assert_close(
        small.get_image_features(images()), net.get_image_features(images(), masks["image"]), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        small.get_text_features(IDS, INSIDE), net.get_text_features(IDS, INSIDE, masks["text"]), rtol=1e-4, atol=1e-5
    )
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    again = Clip(**small.options, input_shape=SHAPE)
    again.load_state_dict(small.state_dict())


def test_masks_reach_the_target_by_the_constraint_alone_and_never_lose_the_last_channel():
    torch.manual_seed(0)
    net = clip()
    total = sum(prunable(e.shape) for e in net.encoders.values())
    sparsity = Sparsity(net.encoders, total, Ramp(0.0, 0.6, 200), lr=0.02, start=2.0)
    for step in range(300):
        terms = sparsity(Signals(), Signals(), {}, Progress(step=step))
        terms["loss"].backward()
        sparsity.before_update(None)  # type: ignore[arg-type]
    assert abs(sparsity.sparsity().item() - 0.6) < 0.05
    logits = MaskLogits(net.image.encoder.shape, -20.0)
    assert int((logits.settle().channels != 0).sum()) == 1  # type: ignore[operator,union-attr]
    assert torch.equal(settled(torch.full((4,), 4.6)) != 0, torch.ones(4, dtype=torch.bool))


def test_a_masked_network_samples_in_training_and_is_fixed_in_evaluation():
    net = clip()
    sparsity = Sparsity(net.encoders, 1000, Ramp(0, 0.5, 1), start=0.0)
    masked = MaskedClip(net, sparsity)
    assert not any("masks" in n for n, _ in masked.named_parameters())
    masked.train()
    first, second = masked.get_image_features(images()), masked.get_image_features(images())
    assert not torch.equal(first, second)
    first.sum().backward()
    assert sparsity.masks["image"].channels.grad is not None
    masked.eval()
    assert torch.equal(masked.get_image_features(images()), masked.get_image_features(images()))


# ---- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, draw = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    colours = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}
    for split, count in (("train", 12), ("test", 5)):
        for name, colour in colours.items():
            (base / split / name).mkdir(parents=True)
            for i in range(count):
                image = np.clip(np.array(colour) + draw.integers(-30, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(base / split / name / f"{i}.png")
    return base


def test_two_steps_leave_a_small_clip_that_loads_and_share_their_first(folder: Path, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = {"projection_dim": 8, "vision_config": {**small, "patch_size": 8}, "text_config": small}
    train = {"epochs": 12, "batch_size": 12, "eval_every": 0, "optimizer": {"name": "adamw", "lr": 1e-2}}
    options = {"tokenizer": "bytes", "context": 12, "templates": ["{}"]}
    data = {"name": f"captions:imagefolder:{folder}", "image_size": 16, "augment": "plain", "options": options}
    manual = {"vision": {"width": 16, "layers": 1, "heads": 2}}
    auto = {"inherit": "auto", "sparsity": 0.6, "prune": {**train, "epochs": 4}}
    raw = {
        "method": "tinyclip",
        "data": data,
        "teacher": {"model": "hf:config:clip", "options": model, "train": train},
        "steps": [manual, auto],
        "scale": 10,
        "mask_lr": 0.5,
        "mask_start": 2.0,
        "train": {**train, "epochs": 6},
        "evaluate": ["zero_shot"],
    }
    figures = execute(recipe.validate(raw), tmp_path / "run", cpu=True)
    assert figures["accuracy"] > 0.6 and 0 < figures["parameters_share"] < 1, "a third is chance"
    product = load_product(tmp_path / "run")
    assert product.model.model == "stillhouse:clip" and len(product.module.image.encoder.layers) == 1
    execute(recipe.validate({**raw, "steps": [manual]}), tmp_path / "one", cpu=True)
    stages = sorted(p.name.partition("-")[0] for p in (tmp_path / "cache" / "stages").iterdir() if p.is_dir())
    assert stages == ["step.0", "step.1", "teacher"]


def test_a_step_that_makes_no_sense_is_refused():
    raw = {"method": "tinyclip", "data": "captions:cifar10", "teacher": {"model": "hf:config:clip", "pretrained": True}}
    with pytest.raises(UserError, match="inherit: auto"):
        recipe.validate({**raw, "steps": [{"inherit": "auto", "sparsity": 0.5}]})
    with pytest.raises(UserError, match="inherit: auto"):
        recipe.validate({**raw, "steps": [{"sparsity": 0.5, "prune": {}}]})
