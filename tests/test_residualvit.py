"""ResidualViT: which patches are read, what a whole frame is the limit of, key frames and cuts, what learns and what
keeps its bits, clips of frames and of a moving window, and a run whose product embeds videos."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from stillhouse.config.specs import DataSpec
from stillhouse.data import BatchKey, load
from stillhouse.data.clips import Clips, Frames, PannedClips, VideoClips, clips_of, panned, videos
from stillhouse.errors import UserError
from stillhouse.functional.motion import block_motion
from stillhouse.functional.token_merging import merge_tokens
from stillhouse.methods.image_text.residualvit.encoder import Reduction, VideoEncoder
from stillhouse.methods.image_text.residualvit.evaluation import compared, grounding, moment
from stillhouse.methods.image_text.residualvit.losses import caption_loss, feature_distance
from stillhouse.methods.image_text.residualvit.reduction import (
    centre_patches,
    kept_count,
    moving_patches,
    uniform_patches,
)
from stillhouse.methods.image_text.residualvit.training import ResidualTraining
from stillhouse.models.clip import Clip
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.prediction import predict
from stillhouse.runs.products import load_product
from stillhouse.training import engine
from stillhouse.training.context import Progress

SIDE, PATCH = 32, 8


def clip(seed: int = 0) -> Clip:
    torch.manual_seed(seed)
    text = {"width": 16, "layers": 2, "heads": 2}
    return Clip({**text, "patch": PATCH}, text, 8, 300, 40, input_shape=(3, SIDE, SIDE)).eval()


def encoder(**reduction: Any) -> VideoEncoder:
    net = clip()
    torch.manual_seed(1)
    return VideoEncoder(net, Reduction(**reduction)).eval()


def frames(count: int = 7, seed: int = 0, change: float = 0.3) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    steps = change * torch.randn(count, 3, SIDE, SIDE, generator=draw)
    return torch.randn(3, SIDE, SIDE, generator=draw) + steps.cumsum(0)


def unit(rows: int, dim: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patches", [1, 4, 49, 196])
@pytest.mark.parametrize("drop", [0.0, 0.5, 0.85, 0.99])
def test_as_many_patches_are_read_as_there_are_and_one_at_least(patches: int, drop: float):
    for training in (True, False):
        count = kept_count(patches, drop, training)
        assert 1 <= count <= patches and (drop > 0 or count == patches)
        assert len(uniform_patches(patches, count).unique()) == count
        assert len(centre_patches(int(patches**0.5), count).unique()) == count


def test_the_released_centre_lies_above_the_exact_one():
    assert centre_patches(4, 6).tolist() == [1, 2, 5, 6, 9, 10]
    exact = centre_patches(4, 4, exact=True)
    assert exact.tolist() == [5, 6, 9, 10]


def test_patches_that_move_are_read_first_and_a_still_frame_is_decided_by_noise():
    change = torch.zeros(2, SIDE, SIDE)
    change[0, 8:16, 16:24], change[0, 0:8, 0:8], change[1, 24:, 24:] = 3.0, 1.0, 2.0
    assert moving_patches(change, PATCH, 2)[0].tolist() == [6, 0]
    assert moving_patches(change, PATCH, 1)[1].tolist() == [15]
    noise = torch.zeros(1, 16)
    noise[0, 11] = 1
    assert moving_patches(torch.zeros(1, SIDE, SIDE), PATCH, 1, noise).tolist() == [[11]]


@pytest.mark.parametrize("shift", [(0, 0), (2, 0), (0, -3), (1, 2)])
def test_blocks_tell_how_far_content_moved(shift: tuple[int, int]):
    before = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    after = before.roll(shift, (2, 3))
    inner = block_motion(after, before)[0, 8:24, 8:24]
    torch.testing.assert_close(inner, torch.full_like(inner, (shift[0] ** 2 + shift[1] ** 2) ** 0.5))


def test_merging_keeps_the_sum_and_the_first_tokens():
    x = torch.randn(2, 10, 4)
    out, size = merge_tokens(x, x, 3, protected=2)
    assert out.shape == (2, 7, 4) and torch.equal(out[:, :2], x[:, :2])
    torch.testing.assert_close((out * size).sum(1), x.sum(1))
    assert torch.equal(size.sum(1), torch.full((2, 1), 10.0))
    assert merge_tokens(x, x, 99)[0].shape[1] == 6, "no more than a half of what may be"
    same, _ = merge_tokens(x, x, 0)
    assert torch.equal(same, x)


# ---- the encoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", ["random", "uniform", "centre", "exact_centre", "motion", "residual", "merge", "resolution"]
)
def test_a_frame_that_is_read_whole_without_a_token_is_that_of_the_clip(mode: str):
    net, x = encoder(mode=mode, drop=0.0, token=False), frames(5)
    found, _ = net.encode(x)
    torch.testing.assert_close(found, F.normalize(net.get_image_features(x), dim=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["random", "uniform", "centre", "motion", "residual", "merge", "resolution"])
def test_key_frames_are_whole_and_the_others_depend_on_the_last_key_frame_alone(mode: str):
    net, x = encoder(mode=mode, drop=0.7, every=2), frames(7)
    found, keys = net.encode(x)
    assert keys == [0, 0, 0, 3, 3, 3, 6]
    whole = F.normalize(net.get_image_features(x), dim=-1)
    assert torch.equal(found[[0, 3, 6]], whole[[0, 3, 6]])
    assert (found * whole).sum(1)[[1, 2, 4, 5]].max() < 1 - 1e-6
    torch.testing.assert_close(found.norm(dim=1), torch.ones(7))
    if mode in ("uniform", "centre", "merge", "resolution"):
        kept = net.kept(x[2:3], None, None, None)
        expected = F.normalize(net.partial(x[2:3], whole[0:1], kept), dim=-1)
        torch.testing.assert_close(found[2:3], expected, rtol=1e-4, atol=1e-5)


def test_what_is_drawn_is_a_function_of_the_generator_and_chunks_change_nothing():
    net, x = encoder(mode="random", drop=0.7), frames(9)
    first, _ = net.encode(x, generator=torch.Generator().manual_seed(5))
    again, _ = net.encode(x, generator=torch.Generator().manual_seed(5))
    other, _ = net.encode(x, generator=torch.Generator().manual_seed(6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    centre = encoder(mode="centre", drop=0.7)
    torch.testing.assert_close(centre.encode(x, chunk=2)[0], centre.encode(x)[0], rtol=1e-4, atol=1e-5)


def test_a_cut_is_a_key_frame_from_which_is_counted_anew():
    x = torch.cat([frames(4, 0, 0.01), frames(4, 9, 0.01)])
    net = encoder(mode="centre", every=2)
    assert net.key_frames(x) == [0, 0, 0, 3, 3, 3, 6, 6]
    assert net.key_frames(x, cut=0.5) == [0, 0, 0, 3, 4, 4, 4, 7]
    assert encoder(every=0).key_frames(x) == list(range(8))


def test_motion_is_given_or_found_and_must_fit():
    net, x = encoder(mode="motion", drop=0.9), frames(3)
    change = torch.zeros(3, SIDE, SIDE)
    change[:, :8, 8:16] = 9
    assert net.kept(x, None, change, None)[:, 0].tolist() == [1, 1, 1]
    with pytest.raises(UserError, match="needs the frames before"):
        net.kept(x, None, None, None)
    with pytest.raises(UserError, match="but frames have"):
        net.kept(x, None, change[:, :8], None)


# ---- training --------------------------------------------------------------------------------------------------------


def batch(clips: int = 4, count: int = 3, seed: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 300, (clips, 6), generator=draw)
    pixels = torch.stack([frames(count, seed + i) for i in range(clips)])
    return {
        "input": {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "label": torch.arange(clips),
    }


@pytest.mark.parametrize("directions", ["v", "both"])
def test_the_loss_is_the_entropy_of_the_whole_frame_where_nothing_is_lost_and_pulls_no_more(directions: Any):
    whole, text, scale = unit(6, 8).view(3, 2, 8), unit(3, 8, 5), torch.tensor(20.0)
    student = whole.clone().requires_grad_()
    loss = caption_loss(student, whole, text, scale, directions)
    loss.backward()
    z = scale * torch.einsum("bfd,cd->fbc", whole, text)
    rows = [
        -(z.softmax(axis) * z.log_softmax(axis)).sum(axis).mean() for axis in ((-1,) if directions == "v" else (-1, 1))
    ]
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    assert student.grad.abs().max() < 1e-6
    assert feature_distance(whole * 3, whole) < 1e-8


def test_frames_are_compared_by_the_captions_of_other_clips_not_of_other_frames():
    whole, text, scale = unit(8, 8).view(2, 4, 8), unit(2, 8, 5), torch.tensor(20.0)
    student = unit(8, 8, 3).view(2, 4, 8)
    each = [caption_loss(student[:, i : i + 1], whole[:, i : i + 1], text, scale) for i in range(4)]
    torch.testing.assert_close(caption_loss(student, whole, text, scale), torch.stack(each).mean())
    with pytest.raises(UserError, match="two clips at least"):
        caption_loss(student[:1], whole[:1], text[:1], scale)


@pytest.mark.parametrize("loss", ["ce", "mse"])
@pytest.mark.parametrize("mode", ["motion", "merge", "resolution"])
def test_the_token_learns_and_the_clip_keeps_its_bits(mode: Any, loss: Any):
    net = encoder(mode=mode, drop=0.75, layers=2)
    module = ResidualTraining(net, loss, "both").train()
    assert not net.clip.training
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.Adam(module.param_groups()[0]["params"], lr=1e-2)
    found = []
    for _ in range(25):
        torch.manual_seed(0)
        terms = module(batch(), Progress())
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append((terms["loss"].item(), terms["cosine"].item()))
    assert found[-1][0] < found[0][0]
    changed = {k.partition(".")[0] for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"residual"}


# ---- clips -----------------------------------------------------------------------------------------------------------


def test_a_video_ends_where_names_or_numbers_jump():
    names = ["b_10", "a_30", "a_60", "a_90", "a_960", "a_990", "b_20.x"]
    assert videos(names) == [[1, 2, 3], [4, 5], [0, 6]]
    assert clips_of(videos(names), 2).tolist() == [[1, 2], [2, 3], [4, 5], [0, 6]]
    assert clips_of(videos(names), 4).shape == (0, 4)
    with pytest.raises(UserError, match="'last' has none"):
        videos(["last"])


def test_a_window_moves_by_its_speed_and_stays_inside():
    ramp = torch.arange(100.0).expand(1, 3, 100, 100)
    clips = Clips(frames=5, motion="panned", zoom=2, speed=0.05, nearer=0)
    for way in torch.linspace(0, 1, 9):
        draws = torch.tensor([[0.5, 0.5, float(way)]])
        found = panned(ramp, draws, clips, (50, 50))
        middle = found[0, :, 0, 25, 25]
        moved = middle.diff()
        torch.testing.assert_close(
            moved, torch.full((4,), 2.5 * float(torch.cos(2 * torch.pi * way))), atol=0.05, rtol=0
        )
        assert found[0, :, 0, 0].diff(dim=-1).min() > 0.9, "never beyond the image"
    near = panned(ramp, draws, Clips(frames=3, motion="panned", zoom=2, speed=0, nearer=0.1), (50, 50))
    widths = near[0, :, 0, 0, -1] - near[0, :, 0, 0, 0]
    torch.testing.assert_close(widths[1:] / widths[:-1], torch.full((2,), 0.9), atol=0.01, rtol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of ten frames a split: a square that moves over a ground of one colour, which changes half-way."""
    base = tmp_path_factory.mktemp("videos")
    for split in ("train", "val", "test"):
        rows = ["file_name,text"]
        (base / split).mkdir()
        for number, (name, ground) in enumerate((("red", (200, 30, 30)), ("blue", (30, 40, 200)))):
            for i in range(10):
                picture = np.tile(np.array(ground, np.uint8), (40, 40, 1))
                later = i >= 5
                picture[20:] = (30, 180, 40) if later else picture[20:]
                picture[2 + i : 10 + i, 3 * i : 3 * i + 8] = 255
                file = f"v{number}_{i:03d}.png"
                Image.fromarray(picture).save(base / split / file)
                rows.append(f"{file},{name} with {'grass' if later else 'nothing'}")
        (base / split / "metadata.csv").write_text("\n".join(rows))
    return base


def spec(folder: Path) -> dict[str, Any]:
    return {
        "name": f"pairs:{folder}",
        "image_size": 32,
        "augment": "plain",
        "options": {"tokenizer": "bytes", "context": 40},
    }


def test_clips_of_videos_hold_neighbours_with_the_caption_of_the_first(folder: Path):
    bundle = load(DataSpec.model_validate(spec(folder)))
    dataset = bundle.dataset("train", train=False)
    rows = clips_of(videos(bundle.named("train")), 4)
    assert len(rows) == 2 * 7
    held = Frames(dataset, dataset.captions, bundle.task)
    clips = VideoClips(held, rows)
    found = clips.batch(BatchKey(0, np.array([3, 9]), 0, 2), 0)
    single = dataset.batch(BatchKey(0, rows[3], 0, 4), 0)["input"]["pixel_values"]
    assert torch.equal(found["input"]["pixel_values"][0], single)
    texts = bundle.task.tokenizer.batch_decode(found["input"]["input_ids"], skip_special_tokens=True)
    assert texts == [dataset.captions(int(rows[i, 0]))[0] for i in (3, 9)]
    moving = PannedClips(held, Clips(frames=3, motion="panned"), (16, 16))
    key = BatchKey(2, np.arange(6), 0, 6)
    one, part = moving.batch(key, 1), moving.batch(BatchKey(2, np.arange(6), 2, 5), 1)
    assert one["input"]["pixel_values"].shape == (6, 3, 3, 16, 16)
    assert torch.equal(one["input"]["pixel_values"][2:5], part["input"]["pixel_values"])


# ---- figures and runs ------------------------------------------------------------------------------------------------


def test_a_moment_is_found_by_similarity_and_judged_by_overlap():
    assert moment(torch.tensor([0.1, 0.2, 0.9, 0.8, 0.1, 0.9])) == (2, 3)
    text = torch.eye(2)
    video = torch.stack([text[0]] * 4 + [text[1]] * 3)
    ids = torch.tensor([7] * 4 + [9] * 3)
    assert grounding([video], [ids], text, torch.tensor([7, 9])) == 1
    assert grounding([video.flip(0)], [ids], text, torch.tensor([7, 9])) == 0


def test_an_encoder_that_reads_all_frames_whole_is_as_good_as_whole_frames():
    net = encoder(every=0)
    ids = torch.tensor([1, 1, 2, 2, 3])
    found = compared(net, [(frames(5), ids)], unit(3, 8), torch.tensor([1, 2, 3]), None, 0)
    assert found["key_share"] == 1
    assert found["interleaved_image_to_text_r1"] == found["whole_image_to_text_r1"]


def config(folder: Path, **further: Any) -> Any:
    half = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    train = {
        "epochs": 2,
        "batch_size": 7,
        "eval_every": 0,
        "log_every": 1,
        "checkpoint_seconds": 0,
        "optimizer": {"name": "adamw", "lr": 1e-2},
    }
    options = {"projection_dim": 8, "vision_config": {**half, "patch_size": 8}, "text_config": half}
    base = {
        "method": "residualvit",
        "data": spec(folder),
        "teacher": {"model": "hf:config:clip", "options": options, "train": {**train, "batch_size": 10}},
        "mode": "centre",
        "drop": 0.7,
        "train": train,
    }
    return recipe.validate({**base, **further})


class Stop(Exception):
    pass


def test_a_run_leaves_an_encoder_of_videos_and_resumes_to_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    figures = execute(config(folder), tmp_path / "whole", cpu=True)
    assert 0 < figures["multiply_adds_share"] < 1 and figures["key_share"] == pytest.approx(0.4)
    assert -1 <= figures["frame_cosine"] <= 1
    collect = engine.Loop._collect

    def stop(self: Any, i: int, terms: Any) -> None:
        collect(self, i, terms)
        if self.stage == "token" and i == 3:
            raise Stop

    monkeypatch.setattr(engine.Loop, "_collect", stop)
    with pytest.raises(Stop):
        execute(config(folder), tmp_path / "again", cpu=True)
    monkeypatch.setattr(engine.Loop, "_collect", collect)
    execute(config(folder), tmp_path / "again", cpu=True)
    name = "product/model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    product = load_product(tmp_path / "whole")
    assert product.reduction == Reduction("centre", 0.7)
    embedded, keys = product.module.encode(frames(5))
    assert embedded.shape == (5, 8) and keys == [0, 0, 0, 3, 3]
    picture = next((folder / "test").glob("*.png"))
    assert "red" in next(predict(tmp_path / "whole", [str(picture)], names=["red", "blue"]))


def test_baselines_train_nothing_and_a_moving_window_needs_no_videos(folder: Path, tmp_path: Path):
    found = execute(config(folder, token=False, train=None), tmp_path / "alone", cpu=True)
    assert "train_seconds" not in found
    moving = config(folder, clips={"frames": 3, "motion": "panned"}, train=None, split="val")
    assert execute(moving, tmp_path / "panned", cpu=True)["key_share"] == pytest.approx(1 / 3)


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="leaves nothing to train"):
        config(folder, token=False)
    with pytest.raises(UserError, match=r"no video of .* has 11 frames"):
        execute(config(folder, clips={"frames": 11}), tmp_path / "long", cpu=True)
    with pytest.raises(UserError, match=r"set data\.image_size to 32"):
        execute(
            config(
                folder,
                data={**spec(folder), "image_size": 40},
                teacher={**config(folder).model_dump(mode="json")["teacher"], "data": spec(folder)},
            ),
            tmp_path / "size",
            cpu=True,
        )
