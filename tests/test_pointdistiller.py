"""PointDistiller: pillars of a real sweep, turned boxes and their precision, local graphs, detectors of points, and
scenes of placed objects."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import load
from stillhouse.data.formats.sweeps import cast
from stillhouse.data.point_scenes import moved, read_sweep
from stillhouse.distillation.distillation import Distillation
from stillhouse.errors import UserError
from stillhouse.evaluation.point_detection import PointDetectionMeter, average_precision
from stillhouse.functional.point_clouds import NOWHERE, farthest_points, nearest_rows, on_grid, pooled, voxelised
from stillhouse.functional.rotated_boxes import bev_corners, overlaps, pairwise_overlaps, shared_area
from stillhouse.models.point_detectors import decoded, encoded
from stillhouse.nn.masked_norm import MaskedBatchNorm
from stillhouse.objectives.pointdistiller import EdgeEncoder, PointDistiller, Rows, graph_of, query_weights
from stillhouse.runs.prediction import predict
from stillhouse.runs.products import Student
from stillhouse.signals import Signals
from stillhouse.tasks.point_detection import PointDetection
from stillhouse.training.context import Progress

SWEEP = Path(os.environ.get("STILLHOUSE_DATA", "")) / "kitti_demo" / "kitti_000008.bin"
LOW, HIGH = (0.0, -12.0, -3.0), (24.0, 12.0, 1.0)
TASK = PointDetection(("car", "pole"), LOW, HIGH, 256, 4, (0.5, 0.5))
SMALL = {"point_pillars": {"width": 4}, "second": {"width": 8}, "point_rcnn": {"width": 8, "points": [32, 8]}}


def cloud(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    low, high = torch.tensor([*LOW, 0.0]), torch.tensor([*HIGH, 1.0])
    return low + (high - low) * torch.rand(*shape, 4, generator=draw)


def target(*boxes: list[float], labels: list[int]) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 7), "labels": torch.tensor(labels, dtype=torch.long)}


# ---- pillars ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SWEEP.is_file(), reason="the sweep is not there")
def test_pillars_of_a_real_sweep_are_those_of_a_plain_loop() -> None:
    """As published for KITTI: pillars of 0.16 m, at most 32 points each."""
    low, high, size = (0.0, -39.68, -3.0), (69.12, 39.68, 1.0), (0.16, 0.16, 4.0)
    points = read_sweep(SWEEP)
    cells: dict[int, list[int]] = {}
    steps = np.floor((points[:, :3] - np.array(low, np.float32)) / np.array(size, np.float32)).astype(int)
    for i in np.flatnonzero(((points[:, :3] >= low) & (points[:, :3] < high)).all(1)):
        cells.setdefault(steps[i, 1] * 432 + steps[i, 0], []).append(i)
    voxels = voxelised(torch.from_numpy(points)[None], low, high, size, 32, 12000)
    full = voxels.counts[0] > 0
    assert voxels.shape == (1, 496, 432)
    assert voxels.cells[0][full].tolist() == sorted(cells)
    assert voxels.counts[0][full].tolist() == [min(len(cells[c]), 32) for c in sorted(cells)]
    sums = pooled(voxels.points, voxels, "sum")[0][full]
    expected = np.stack([points[cells[c][:32]].sum(0) for c in sorted(cells)])
    torch.testing.assert_close(sums, torch.from_numpy(expected), rtol=1e-4, atol=1e-3)


def test_the_fullest_pillars_stay_and_padding_counts_for_nothing() -> None:
    a, b = [1.0, 0.2, 0.0, 0.5], [9.0, 3.0, 0.0, 0.5]
    points = torch.tensor([[a, b, b, b, [NOWHERE] * 4], [a, a, [NOWHERE] * 4, [NOWHERE] * 4, [NOWHERE] * 4]])
    voxels = voxelised(points, LOW, HIGH, (1.0, 1.0, 4.0), 2, 1)
    assert voxels.counts.tolist() == [[2], [2]], "at most two points of a pillar, one pillar of a cloud"
    assert voxels.cells.tolist() == [[15 * 24 + 9], [12 * 24 + 1]]
    grid = on_grid(voxels.counts[..., None].float(), voxels)
    assert grid.shape == (2, 1, 1, 24, 24) and grid.sum().item() == 4 and grid[0, 0, 0, 15, 9] == 2
    empty = voxelised(torch.full((1, 3, 4), NOWHERE), LOW, HIGH, (1.0, 1.0, 4.0), 2, 2)
    assert empty.counts.sum() == 0 and not empty.valid.any()


def test_neighbours_are_those_of_all_distances_whatever_the_chunk() -> None:
    rows = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(40).expand(2, 40) < 30
    distances = torch.cdist(rows, rows).masked_fill(~valid[:, None], math.inf)
    expected = distances.topk(6, dim=-1, largest=False).indices.sort(-1).values
    for chunk in (7, 100):
        assert torch.equal(nearest_rows(rows, rows, 6, valid, chunk).sort(-1).values, expected)
    assert torch.equal(nearest_rows(rows[:, :30], rows, 1, valid)[..., 0], torch.arange(30).expand(2, 30))


def test_farthest_points_are_spread_and_valid() -> None:
    xyz = torch.tensor([[[0.0, 0, 0], [0.1, 0, 0], [5.0, 0, 0], [9.0, 0, 0], [99.0, 0, 0]]])
    valid = torch.tensor([[True, True, True, True, False]])
    assert farthest_points(xyz, 3, valid).tolist() == [[0, 3, 2]]


# ---- boxes -----------------------------------------------------------------------------------------------------------


def test_turned_boxes_share_what_a_fine_grid_says() -> None:
    draw = torch.Generator().manual_seed(0)
    boxes = torch.rand(12, 7, generator=draw) * torch.tensor([2, 2, 1, 3, 2, 1, 6.0]) + torch.tensor(
        [0, 0, 0, 0.5, 0.5, 0.5, -3.0]
    )
    steps = torch.linspace(-4, 7, 600)
    x, y = torch.meshgrid(steps, steps, indexing="ij")

    def covered(box: Tensor) -> Tensor:
        dx, dy, cos, sin = x - box[0], y - box[1], box[6].cos(), box[6].sin()
        return ((cos * dx + sin * dy).abs() <= box[3] / 2) & ((cos * dy - sin * dx).abs() <= box[4] / 2)

    masks = [covered(b) for b in boxes]
    counted = torch.tensor([[(a & b).sum() / (a | b).sum() for b in masks] for a in masks])
    torch.testing.assert_close(pairwise_overlaps(boxes, boxes)[0], counted, rtol=0, atol=0.02)


def test_overlaps_of_known_boxes() -> None:
    box = torch.tensor([1.0, 2.0, 0.0, 4.0, 2.0, 1.5, 0.3])
    half_turn, apart, above = box.clone(), box.clone(), box.clone()
    half_turn[6] += math.pi
    apart[0] += 100
    above[2] += 0.75
    for other, expected in ((box, (1, 1)), (half_turn, (1, 1)), (apart, (0, 0)), (above, (1, 1 / 3))):
        got = overlaps(box, other)
        assert [float(v) for v in got] == pytest.approx(expected, abs=1e-5)
    square = torch.tensor([0.0, 0, 0, 2, 2, 1, 0])
    diamond = torch.tensor([0.0, 0, 0, 2, 2, 1, math.pi / 4])
    area = shared_area(bev_corners(square), bev_corners(diamond))
    assert float(area) == pytest.approx(8 * (math.sqrt(2) - 1), rel=1e-5), "a regular octagon"
    assert pairwise_overlaps(torch.zeros(0, 7), torch.zeros(3, 7))[0].shape == (0, 3)


def test_precision_counts_each_true_box_once_and_leaves_out_ignored_ones() -> None:
    none = torch.tensor([False, False])
    perfect = (torch.tensor([0.9, 0.8]), torch.eye(2), none)
    twice = (torch.tensor([0.9, 0.8]), torch.tensor([[0.9, 0.0], [0.9, 0.0]]), none)
    assert average_precision([perfect], 0.5) == 1.0
    assert average_precision([twice], 0.5) == 0.5, "one of two is found, with precision 1; the duplicate is wrong"
    wrong_first = (torch.tensor([0.9, 0.8]), torch.tensor([[0.1, 0.0], [0.9, 0.0]]), none)
    assert average_precision([wrong_first], 0.5) == 0.25
    ignored = (torch.tensor([0.9, 0.8]), torch.eye(2), torch.tensor([True, False]))
    assert average_precision([ignored], 0.5) == 1.0
    assert average_precision([(torch.zeros(0), torch.zeros(0, 2), none)], 0.5) == 0.0


def test_the_meter_judges_by_class_and_refuses_nothing_and_nan() -> None:
    boxes = torch.tensor([[5.0, 0, -1, 4, 2, 1.5, 0.2], [9.0, 3, -1, 0.5, 0.5, 3, 0]])[None]
    found = Signals(parts={"boxes": boxes, "scores": torch.tensor([[0.9, 0.8]]), "labels": torch.tensor([[0, 1]])})
    batch = {"target": [{"boxes": boxes[0], "labels": torch.tensor([0, 1])}]}
    meter = PointDetectionMeter(("car", "pole"), ["detection", "classes"], (0.5, 0.5))
    meter.add(batch, found)
    figures = meter.figures()
    assert figures["ap_bev"] == figures["ap_3d"] == figures["ap_bev_class_car"] == 1.0
    found.parts["labels"] = torch.tensor([[1, 0]])
    meter = PointDetectionMeter(("car", "pole"), ["detection"], (0.5, 0.5))
    meter.add(batch, found)
    assert meter.figures()["ap_bev"] == 0.0
    found.parts["scores"] = torch.tensor([[math.nan, 0.8]])
    for more, sentence in (
        (batch, "finite"),
        ({"target": [{k: v[:0] for k, v in batch["target"][0].items()}]}, "no box"),
    ):
        meter = PointDetectionMeter(("car", "pole"), ["detection"], (0.5, 0.5))
        meter.add(more, found)
        with pytest.raises(UserError, match=sentence):
            meter.figures()


def test_codes_are_read_back_up_to_a_half_turn() -> None:
    boxes = torch.tensor([[5.0, 1, -1, 4, 2, 1.5, 2.9], [3.0, -2, 0, 1, 2, 3, -0.4]])
    origin = torch.tensor([[4.5, 1.5], [3.5, -2.5]])
    above, space = overlaps(boxes, decoded(encoded(boxes, origin), origin))
    torch.testing.assert_close(torch.stack([above, space]), torch.ones(2, 2), rtol=0, atol=1e-4)


# ---- detectors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_detectors_take_empty_clouds_and_targets_and_any_padding(name: str) -> None:
    torch.manual_seed(0)
    net = TASK.build(ModelSpec(model=f"stillhouse:{name}", options=SMALL[name]))
    points = cloud(2, 200)
    padded = torch.cat([points, torch.full((2, 56, 4), NOWHERE)], 1)
    full = target([8.0, 1, -1, 4, 2, 1.5, 0.4], labels=[0])
    empty = target(labels=[])
    losses = {}
    for key, targets in (("both", [full, empty]), ("none", [empty, empty])):
        net.zero_grad()
        losses[key] = net(padded, targets)
        torch.stack(list(losses[key].values())).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    assert losses["none"]["box"] == 0
    net(torch.full((2, 256, 4), NOWHERE), [empty, empty])["score"].backward()
    net.eval()
    with torch.no_grad():
        short, long = net(points), net(padded)
    assert short["boxes"].shape == (2, 50, 7)
    torch.testing.assert_close(short["scores"], long["scores"], rtol=1e-4, atol=1e-5)
    assert (long["scores"].diff(dim=1) <= 0).all()


def test_the_box_loss_of_a_scene_does_not_depend_on_empty_ones_beside_it() -> None:
    torch.manual_seed(0)
    net = TASK.build(ModelSpec(model="stillhouse:point_pillars", options={"width": 4})).eval()
    full, empty = target([8.0, 1, -1, 4, 2, 1.5, 0.4], labels=[0]), target(labels=[])
    points = cloud(2, 200)
    alone, both = net(points[:1], [full])["box"], net(points, [full, empty])["box"]
    torch.testing.assert_close(alone, both)


def test_norm_of_some_rows_is_batch_norm_of_these() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(30, 4), torch.arange(30) < 20
    ours, theirs = MaskedBatchNorm(4), torch.nn.BatchNorm1d(4)
    torch.testing.assert_close(ours(x, mask)[:20], theirs(x[:20]), rtol=1e-4, atol=1e-5)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


# ---- local graphs ----------------------------------------------------------------------------------------------------


def rows(groups: int = 1, number: int = 30, there: int = 30) -> Rows:
    draw = torch.Generator().manual_seed(0)
    real = (torch.arange(number) < there).expand(groups, number)
    s, t = torch.randn(groups, number, 4, generator=draw), torch.randn(groups, number, 6, generator=draw)
    counts = torch.randint(1, 33, (groups, number), generator=draw) * real
    return Rows(s.requires_grad_() * real[..., None], t * real[..., None], counts.float(), real)


def objective(**options: object) -> PointDistiller:
    torch.manual_seed(0)
    made = PointDistiller(**{"queries": 12, "neighbours": 5, **options})
    made.students, made.teachers = torch.nn.ModuleList([EdgeEncoder(4, 7)]), torch.nn.ModuleList([EdgeEncoder(6, 7)])
    return made


def test_edges_are_those_of_a_layer_on_neighbour_and_centre() -> None:
    x, chosen, near = torch.randn(1, 9, 4), torch.tensor([[2, 5]]), torch.tensor([[[2, 1, 0], [5, 8, 3]]])
    for edge in ("concat", "sub"):
        encoder = EdgeEncoder(4, 3, edge).eval()
        centre, other = x[0, chosen[0]][:, None].expand(-1, 3, -1), x[0, near[0]]
        edges = torch.cat([other, centre] if edge == "concat" else [centre - other, centre], -1)
        torch.testing.assert_close(encoder(x, chosen, near)[0], encoder.norm(encoder.linear(edges)).relu())


def test_empty_slots_change_nothing() -> None:
    """Pillars that are not there are no queries, no neighbours, and no part of the statistics."""
    full = rows(number=30, there=18)
    cut = Rows(*(v[:, :18] for v in (full.student, full.teacher, full.importance, full.there)))
    for options in ({}, {"queries": 40}, {"reweight": "none"}, {"reweight": "norm"}):
        torch.testing.assert_close(objective(**options).layer(full, 0), objective(**options).layer(cut, 0))


def test_a_batch_without_pillars_gives_zero_with_gradient() -> None:
    nothing = rows(there=0)
    loss = objective().layer(nothing, 0)
    loss.backward()
    assert loss == 0


def test_weights_have_mean_one_and_the_released_ones_leave_the_fullest() -> None:
    counts = torch.tensor([[32.0, 31, 20, 5, 0]])
    valid = counts > 0
    smooth = query_weights(counts, 0.1, "softmax", valid)
    assert float(smooth.sum()) == pytest.approx(4) and smooth[0, 1] > 0.5 and smooth[0, 4] == 0
    official = query_weights(counts, 0.01, "official", valid)
    assert official[0].tolist() == pytest.approx([4, 0, 0, 0, 0])
    assert query_weights(counts, 0.1, "none", valid)[0].tolist() == pytest.approx([1, 1, 1, 1, 0])


def test_the_graph_is_the_teachers_and_its_rows_get_no_gradient() -> None:
    made = rows()
    chosen, near = graph_of(made, 12, 5)
    assert sorted(made.importance[0, chosen[0]].tolist()) == sorted(made.importance[0].topk(12).values.tolist())
    assert torch.equal(near[0, :, 0], chosen[0]), "a row is its own nearest"
    some, _ = graph_of(rows(there=18), 12, 5, "random")
    assert (some < 18).all()
    torch.manual_seed(1)
    others, _ = graph_of(made, 12, 5, "random")
    assert not torch.equal(others, chosen)


def test_a_frozen_encoder_of_the_teacher_gets_no_gradient() -> None:
    for frozen in (False, True):
        made = objective()
        made.layer(rows(), 0, frozen).backward()
        assert (made.teachers[0].linear.weight.grad is None) == frozen
        assert made.students[0].linear.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"queries": 0}, "queries"), ({"temperature": 0}, "temperature"), ({"student_layers": ["a", "b"]}, "as many")],
)
def test_wrong_options_get_a_sentence(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        PointDistiller(**options)


FORMS = {"pillars": "point_pillars", "maps": "second", "points": "point_rcnn"}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_teaches_its_detector(form: str) -> None:
    name = FORMS[form]
    torch.manual_seed(0)
    teacher = TASK.build(ModelSpec(model=f"stillhouse:{name}", options={**SMALL[name], "width": 12})).eval()
    student = TASK.build(ModelSpec(model=f"stillhouse:{name}", options=SMALL[name]))
    batch = {"input": cloud(2, 256), "target": [target([8.0, 1, -1, 4, 2, 1.5, 0.4], labels=[0])] * 2}
    module = Distillation(student, teacher, [PointDistiller(form, queries=20, neighbours=4)], task=TASK)
    module.build(batch).train()
    optimizer = torch.optim.Adam(module.param_groups(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = module(batch, Progress())["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(module.figures()) == {"effective_queries", "neighbour_agreement", "edge_spread"}


def test_other_pillars_are_refused() -> None:
    torch.manual_seed(0)
    teacher = TASK.build(ModelSpec(model="stillhouse:point_pillars", options={"width": 8})).eval()
    batch = {"input": cloud(2, 256), "target": [target(labels=[])] * 2}
    for options in ({"voxel": [1.0, 1.0]}, {"pillars": 50}, {"most_points": 1}):
        student = TASK.build(ModelSpec(model="stillhouse:point_pillars", options={"width": 4, **options}))
        with pytest.raises(UserError, match="same points in their pillars"):
            Distillation(student, teacher, [PointDistiller()], task=TASK).build(batch)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_rays_end_at_the_first_object_and_nothing_else_moves() -> None:
    draw = np.random.default_rng(0)
    points = np.array([[20, 0, 0, 0.3], [20, 0.1, 0, 0.3], [20, 5, 0, 0.3], [4, 0, 0, 0.3]], np.float32)
    boxes = np.array([[10, 0, 0, 0.4, 0.4, 3.0, 0.5], [15, 0, 0, 0.4, 0.4, 3.0, 0.0]])
    found, hits = cast(points, boxes, np.array([2, 2]), draw)
    assert hits.tolist() == [2, 0], "the second is hidden"
    assert abs(found[0, 0] - 9.8) < 0.2 and np.array_equal(found[2:], points[2:])
    assert found[:2, 3].tolist() != [0.3, 0.3]


def test_points_and_boxes_move_together() -> None:
    torch.manual_seed(3)
    box = torch.tensor([[10.0, 3.0, -1.0, 4.0, 2.0, 1.5, 0.4]])
    corners = torch.cat([bev_corners(box)[0], torch.full((4, 1), -1.0), torch.zeros(4, 1)], 1)
    for _ in range(6):
        points, boxes = moved(corners, box)
        away = torch.cdist(bev_corners(boxes)[0], points[:, :2]).amin(1)
        assert away.amax() < 1e-4


@pytest.mark.skipif(not SWEEP.is_file(), reason="the sweep is not there")
def test_scenes_are_functions_of_their_keys_and_their_boxes_are_hit() -> None:
    spec = DataSpec(name=f"sweeps:{SWEEP}", options={"scenes": 6, "test_scenes": 3}, augment="standard")
    first, second = load(spec), load(spec)
    assert first.fingerprint == second.fingerprint
    a, b = (bundle.dataset("train", train=True)._sample(2, 1, 0) for bundle in (first, second))
    assert torch.equal(a["input"], b["input"]) and torch.equal(a["target"]["boxes"], b["target"]["boxes"])
    plain = [first.dataset("test", train=False)[i] for i in range(3)]
    assert all(len(s["target"]["boxes"]) for s in plain)
    other = load(spec.model_copy(update={"options": {"scenes": 6, "test_scenes": 3, "seed": 1}}))
    assert other.fingerprint != first.fingerprint
    with pytest.raises(UserError, match="low below high"):
        load(spec.model_copy(update={"options": {"low": (0, 0, 0), "high": (-1, 1, 1)}}))


def test_kitti_boxes_come_to_the_sensors_coordinates(tmp_path: Path) -> None:
    for folder in ("training/velodyne", "training/label_2", "training/calib", "ImageSets"):
        (tmp_path / folder).mkdir(parents=True)
    for split, name in (("train", "000000"), ("val", "000001")):
        (tmp_path / "ImageSets" / f"{split}.txt").write_text(f"{name}\n")
        np.array([[10, 1, -1, 0.5], [10, 500, 0, 0.5]], np.float32).tofile(tmp_path / f"training/velodyne/{name}.bin")
        (tmp_path / f"training/calib/{name}.txt").write_text(
            "P2: 700 0 600 0 0 700 180 0 0 0 1 0\nR0_rect: 1 0 0 0 1 0 0 0 1\n"
            "Tr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0\n"
        )
        (tmp_path / f"training/label_2/{name}.txt").write_text(
            "Car 0.00 0 0 100 100 200 200 1.5 1.6 3.9 2.0 1.7 10.0 -1.57\n"
            "Car 0.00 3 0 100 100 200 200 1.5 1.6 3.9 -2.0 1.7 20.0 0.0\n"
            "DontCare -1 -1 -10 0 0 9 9 -1 -1 -1 -1 -1 -1 -1\n"
        )
    bundle = load(DataSpec(name=f"kitti:{tmp_path}", options={"points": 8}))
    sample = bundle.dataset("test", train=False)[0]
    box = sample["target"]["boxes"][0].tolist()
    assert box == pytest.approx([10.0, -2.0, -1.7 + 0.75, 3.9, 1.6, 1.5, 1.57 - math.pi / 2], abs=1e-4)
    assert sample["target"]["ignored"].tolist() == [False, True] and sample["target"]["labels"].tolist() == [2, 2]
    assert len(bundle.dataset("train", train=True)[0]["target"]["boxes"]) == 1, "what is ignored is not learned"
    assert (sample["input"][:, 0] > NOWHERE).sum() == 1, "points that the camera does not see are left out"
    (tmp_path / "training/calib/000001.txt").write_text("P2: 1\n")
    with pytest.raises(UserError, match="calibration"):
        bundle.dataset("test", train=False)[0]


@pytest.mark.skipif(not SWEEP.is_file(), reason="the sweep is not there")
def test_a_product_predicts_a_sweep_from_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = ModelSpec(model="stillhouse:point_pillars", options={"width": 4})
    net = TASK.build(spec)
    torch.nn.init.constant_(net.head.out.bias[:2], 3.0)  # boxes everywhere
    Student(net, spec, TASK).save(tmp_path / "product")
    line = next(predict(tmp_path / "product", [str(SWEEP)], tmp_path / "out"))
    assert "kitti_000008.bin" in line and (tmp_path / "out" / "kitti_000008.png").is_file()
    with pytest.raises(UserError, match="no sweep"):
        (tmp_path / "broken.bin").write_bytes(b"123")
        next(predict(tmp_path / "product", [str(tmp_path / "broken.bin")]))
