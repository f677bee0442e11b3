"""DistillDIFT: one small network learns which patches of two images two slow ones hold alike, then from depth which are
the same.

paper: Distillation of Diffusion Features for Semantic Correspondence
venue: WACV 2025
arxiv: 2412.03512
task: semantic correspondence
family: feature relations
use when: points are to be found again in images of other things of the same kind, and the features that do it are slow
needs: images of one kind of thing, without labels; for the refinement, views of one thing with depth and cameras

Features of a diffusion network know geometry, self-supervised ones know what things are; both together match best, and
slowly. What counts for matching is only how similar the patches of two images are. So the student does not copy
features: for a pair of images, each row of its map of similarities, softened by a temperature, shall be that of the
teachers' concatenated features. Then views with depth give points that are the same, exactly and for nothing: the
student's soft argmax is drawn to them (refinement).

The student begins from pretrained weights, and learns by low-rank adapters of its queries and values, which are merged
at the end, or whole (`student.trains: all`). `pck` is the share of points found within a tenth of the body's longer
side: of the product, of the student as it began (`pck_start`) and before refinement (`pck_distilled`), and of the
teachers, each and together. `similarity_correlation` is how alike the student's and the teachers' similarities are on
test pairs.

    stillhouse run recipes/correspondence/distilldift.yaml
    stillhouse predict runs/distilldift-s0 one.jpg other.jpg --out found

Departures and choices. Views of FAUST's bodies take the place of SPair-71k and CO3D: points of other bodies are known,
and depth is exact. The diffusion teacher is a small U-Net trained on these views (SDXL-Turbo in the paper), the second
one the first stages of an ImageNet network, enlarged (DINOv2). The student is a small transformer on the first blocks
of the ImageNet network (`student.stem`), of which all is trained: adapters alone change too little of a transformer
that is new. Without a stem it can be made self-supervised on the views, by patches of two recoloured and moved copies
(`student.start`); a pretrained one is `student.network.pretrained: true`. The released loss gives probabilities to a
cross-entropy with a second softmax over source patches (`distil.form: official`, and `sce` in both directions), and
normalises the teachers over image columns (`distil.normalise: width`); the defaults are as the text has them. The
released list of trained weights contains `qkv` itself (`student.train_qkv`). The soft argmax of the refinement has beta
30: with the published 1000 it is nearly the hard one, and a new student hardly moves. Places of pixels on grids are
those of their middles.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import MethodConfig, ModelSpec, Spec
from stillhouse.data.source import find_root, located
from stillhouse.errors import UserError
from stillhouse.methods.correspondence.distilldift.adapters import adapted, merge
from stillhouse.methods.correspondence.distilldift.losses import (
    Form,
    blur_loss,
    cells,
    concatenated,
    correspondences,
    distillation_loss,
    nearest_cells,
    neighbours,
    similarity,
    soft_argmax_loss,
    within,
)
from stillhouse.methods.correspondence.distilldift.networks import (
    DenoisingUNet,
    Features,
    GeometrySpec,
    PatchNetwork,
    SemanticsSpec,
    StemSpec,
    TappedNetwork,
    in_range,
    view_invariance,
)
from stillhouse.methods.correspondence.distilldift.product import ImageMatcher, with_points
from stillhouse.methods.correspondence.distilldift.views import (
    Pictures,
    ViewsSpec,
    bodies,
    matched_pixels,
    reach_of,
    rendered,
    test_pairs,
)
from stillhouse.models import build
from stillhouse.randomness import generator, keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.gallery import FOLDER, write_pictures
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import state_on_cpu
from stillhouse.runs.run import Run

AT_ONCE = 32  # images that are computed together where nothing is trained
SHOWN = 6
PCK = 0.1
WARMUP = 20  # steps over which rates rise


class StartSpec(Spec):
    """How the student becomes self-supervised."""

    steps: int = Field(200, ge=1)
    batch_size: int = Field(8, ge=2)
    lr: float = Field(1e-3, gt=0, description="Of AdamW.")


class StudentSpec(Spec):
    """The student, a vision transformer, and what of it learns."""

    network: ModelSpec
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    stem: StemSpec | None = Field(None, description="What gives its patches, instead of its own first layer.")
    start: StartSpec | None = Field(default_factory=StartSpec, description="null: as its weights are.")
    trains: Literal["adapters", "all"] = Field("adapters", description="Low-rank adapters, or all weights.")
    rank: int = Field(8, ge=1, description="Of adapters.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Of the output of adapted layers.")
    train_qkv: bool = Field(False, description="Train the adapted layers themselves too, as released.")


class DistilSpec(Spec):
    """The distillation."""

    steps: int = Field(300, ge=0)
    batch_size: int = Field(8, ge=1, description="Pairs.")
    lr: float = Field(1e-3, gt=0, description="Of AdamW; a tenth of it after half of the steps.")
    weight_decay: float = Field(0.05, ge=0)
    tau: float = Field(0.05, description="Temperature of similarities.")
    loss: Literal["relations", "features"] = Field(
        "relations", description="Similarity maps; or the mean square error of features through a linear head."
    )
    form: Form = Field("paper", description="paper; official and sce: as released.")
    normalise: Literal["channels", "width"] = Field("channels", description="Of each teacher's features.")
    pairs: Literal["any", "retrieved"] = Field("any", description="Two images; or an image and one of its neighbours.")
    neighbours: int = Field(10, ge=1, description="Among how many.")
    cached: bool = Field(True, description="Compute the teachers' features of all images once; false: in each step.")


class RefineSpec(Spec):
    """The refinement by points that depth gives."""

    steps: int = Field(150, ge=1)
    batch_size: int = Field(8, ge=1, description="Pairs of views of a body.")
    points: int = Field(64, ge=1, description="Points of a pair.")
    lr: float = Field(5e-4, gt=0, description="Of AdamW, constant.")
    weight_decay: float = Field(0.05, ge=0)
    loss: Literal["soft_argmax", "blur"] = "soft_argmax"
    beta: float = Field(30.0, gt=0, description="Of the soft argmax; published: 1000, nearly the hard one.")
    jitter: float = Field(1.0, ge=0, description="Standard deviation of the noise on places, in cells.")
    tau: float = Field(0.05, gt=0, description="Of blur.")
    kernel: int = Field(7, ge=1, description="Cells of the window that blurs.")
    tolerance: float = Field(0.01, gt=0, description="Of depth, where a point counts as visible.")


class Config(MethodConfig):
    views: ViewsSpec
    geometry: GeometrySpec = Field(default_factory=GeometrySpec)
    semantics: SemanticsSpec = Field(default_factory=SemanticsSpec)
    teachers: list[Literal["geometry", "semantics"]] = Field(["geometry", "semantics"], min_length=1)
    student: StudentSpec
    distil: DistilSpec = Field(default_factory=DistilSpec)
    refine: RefineSpec | None = Field(default_factory=RefineSpec, description="null: none.")
    window: int = Field(0, ge=0, description="Of the soft argmax around the best place, in pixels; 0: none.")


VIEWS = Stage("views", "render the bodies, their depth and their points (shared)")
GEOMETRY = Stage("geometry", "train the denoising U-Net (shared)")
START = Stage("start", "make the student self-supervised (shared)")
DISTIL = Stage("distil", "teach it the teachers' similarities")
REFINE = Stage("refine", "teach it points that depth gives")


class DistillDIFT(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        _check(config)
        student = {"student": config.student.network.model}
        stages = [VIEWS]
        if "geometry" in config.teachers:
            stages.append(GEOMETRY.filled(steps=config.geometry.steps))
        if config.student.start is not None:
            stages.append(START.filled(steps=config.student.start.steps, models=student))
        stages.append(DISTIL.filled(steps=config.distil.steps, models=student))
        return [*stages, REFINE.filled(steps=config.refine.steps)] if config.refine is not None else stages

    def run(self, config: Config, run: Run) -> ImageMatcher:
        train, test = (_pictures(run, config, which).to(run.device) for which in (True, False))
        pairs = test_pairs(_pictures(run, config, False), config.views).to(run.device)
        student = _start(run, config, train)
        teachers = _teachers(run, config, train, student)
        begun = _pck(student, test, pairs)
        figures = {"pck_start": begun}
        start = copy.deepcopy(student)
        if config.student.trains == "adapters":
            with keyed("adapters", run.seed):
                adapted(student, config.student.rank, config.student.dropout, config.student.train_qkv)
            student.to(run.device)
        figures["train_seconds"] = _distil(run, config, student, train, teachers)
        figures["pck_distilled"] = _pck(student, test, pairs)
        if config.refine is not None:
            figures["train_seconds"] += _refine(run, config, config.refine, student, train)
        merge(student)
        together = _together(teachers, config, student.eval())
        for name, teacher in teachers.items():
            figures[f"pck_{name}"] = _pck(teacher, test, pairs)
        figures["pck_teachers"] = _pck(together, test, pairs)
        figures |= _compared(student, together, test, pairs)
        _draw(run, test, pairs, {"student": student, "teachers": together, "before": start})
        spec = ModelSpec(model=config.student.network.model, options=config.student.network.options)
        return ImageMatcher(copy.deepcopy(student).cpu().eval(), spec, config.window, config.student.stem, figures)


def _check(config: Config) -> None:
    if not config.distil.tau > 0:
        raise UserError(f"distil.tau must be above 0; given: {config.distil.tau}.")
    if len(set(config.teachers)) < len(config.teachers):
        raise UserError("teachers names one teacher twice.")
    both = set(config.views.train) & set(config.views.test)
    if both:
        raise UserError(f"The mesh '{min(both)}' is in views.train and in views.test.")


def _root(config: Config, run: Run) -> Path:
    return Path(config.views.root).expanduser() if config.views.root else find_root(None, run.data_root)


def _pictures(run: Run, config: Config, train: bool) -> Pictures:
    meshes = bodies(config.views, _root(config, run), train)
    uses = {"views": config.views, "meshes": {name: mesh.vertices for name, mesh in meshes.items()}}
    which = f"{VIEWS}.{'train' if train else 'test'}"
    return Pictures(**run.stage(which, lambda: rendered(config.views, meshes, train).arrays(), uses))


def _placed(spec: ModelSpec, run: Run) -> ModelSpec:
    """The spec with files that lie under the data root."""
    return ModelSpec.model_validate(located(spec.model_dump(), find_root(None, run.data_root)))


def _start(run: Run, config: Config, train: Pictures) -> PatchNetwork:
    """The student as it begins."""
    spec, start = config.student, config.student.start
    with keyed("student", run.seed):
        stem = spec.stem and spec.stem.model_copy(update={"network": _placed(spec.stem.network, run)})
        student = PatchNetwork(_placed(spec.network, run), train.side, spec.mean, spec.std, stem)
    if start is None:
        return student.to(run.device).eval()

    def make() -> dict[str, Tensor]:
        model = copy.deepcopy(student).to(run.device).train()
        with torch.no_grad():
            found = model(train.images[:1])
        width, patch = found.shape[1], train.side // found.shape[-1]
        with keyed("head", run.seed):
            head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 64))
        head.to(run.device)
        optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=start.lr, weight_decay=0.05)

        def step(i: int) -> dict[str, Tensor]:
            chosen = torch.randint(len(train), (start.batch_size,), device=run.device)
            loss = view_invariance(model, head, train.images[chosen], patch)
            _update(optimizer, loss, start.lr * min(1.0, (i + 1) / WARMUP))
            return {"loss": loss.detach()}

        run.loop(START, {"model": model, "head": head, "optimizer": optimizer}, step, start.steps)
        return state_on_cpu(model)

    uses = {"images": train.images, "student": student, "see": [spec.mean, spec.std], "start": start}
    student.load_state_dict(run.stage(START, make, uses | {"seed": run.seed}))
    return student.to(run.device).eval()


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _teachers(run: Run, config: Config, train: Pictures, start: PatchNetwork) -> dict[str, Features]:
    """The teachers by name: functions of images."""
    found: dict[str, Features] = {}
    for name in config.teachers:
        if name == "geometry":
            found[name] = _geometry(run, config, train)
        elif config.semantics.network is None:
            frozen = copy.deepcopy(start).eval().requires_grad_(False)
            found[name] = frozen
        else:
            with keyed("semantics"):
                spec = _placed(config.semantics.network, run).with_classifier("same")
                network = build(spec, None, (3, train.side, train.side)).to(run.device)
            found[name] = TappedNetwork(config.semantics, network, train.side)
    return found


def _geometry(run: Run, config: Config, train: Pictures) -> Features:
    """The features of the denoising U-Net, trained first."""
    spec = config.geometry

    def make() -> dict[str, Tensor]:
        with run.seeded(0):
            with keyed("geometry"):
                model = DenoisingUNet(spec.width)
            model.to(run.device).train()
            images = in_range(train.images, spec.side)
            optimizer = torch.optim.AdamW(model.parameters(), lr=spec.lr, weight_decay=0.01)

            def step(i: int) -> dict[str, Tensor]:
                chosen = torch.randint(len(images), (spec.batch_size,), device=run.device)
                loss = model.loss(images[chosen])
                _update(optimizer, loss, spec.lr * min(1.0, (i + 1) / 50, 4 * (spec.steps - i) / spec.steps))
                return {"loss": loss.detach()}

            run.loop(GEOMETRY, {"model": model, "optimizer": optimizer}, step, spec.steps)
        return state_on_cpu(model)

    trained = {"side", "width", "steps", "batch_size", "lr"}
    uses = {"images": train.images, "geometry": spec.model_dump(mode="json", include=trained)}
    model = DenoisingUNet(spec.width)
    model.load_state_dict(run.stage(GEOMETRY, make, uses))
    model.to(run.device).eval().requires_grad_(False)
    noise = torch.randn(spec.draws, 3, spec.side, spec.side, generator=generator("noise of features")).to(run.device)

    def features(images: Tensor) -> Tensor:
        return model.features(in_range(images, spec.side), spec, noise)

    return features


def _in_parts(features: Features, images: Tensor) -> Tensor:
    """Features of many images, some at a time, without gradients."""
    with torch.no_grad():
        return torch.cat([features(some) for some in images.split(AT_ONCE)])


def _together(teachers: dict[str, Features], config: Config, student: PatchNetwork) -> Features:
    """The concatenated features of all teachers, on the student's grid."""
    with torch.no_grad():
        size = student(torch.zeros(1, 3, student.side, student.side, device=_device(student))).shape[-2:]

    def features(images: Tensor) -> Tensor:
        maps = [teacher(images) for teacher in teachers.values()]
        return concatenated(maps, (size[0], size[1]), config.distil.normalise)

    return features


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _distil(run: Run, config: Config, student: PatchNetwork, train: Pictures, teachers: dict[str, Features]) -> float:
    """Seconds of the distillation."""
    spec, images = config.distil, train.images
    if not spec.steps:
        return 0.0
    student.train()
    together = _together(teachers, config, student)
    cached = _in_parts(together, images) if spec.cached else None
    nearest = None
    if spec.pairs == "retrieved":
        first = next(iter(reversed(teachers.values())))
        nearest = neighbours(torch.cat([first(part).mean((2, 3)) for part in images.split(AT_ONCE)]), spec.neighbours)
    head: nn.Module = nn.Identity()
    if spec.loss == "features":
        with torch.no_grad():
            widths = student(images[:1]).shape[1], together(images[:1]).shape[1]
        with keyed("regression", run.seed):
            head = nn.Linear(*widths)
        head.to(run.device)
    weights = [p for p in (*student.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=spec.lr, weight_decay=spec.weight_decay)

    def step(i: int) -> dict[str, Tensor]:
        one = torch.randint(len(images), (spec.batch_size,), device=run.device)
        if nearest is None:
            two = (one + torch.randint(1, len(images), one.shape, device=run.device)) % len(images)
        else:
            two = nearest[one, torch.randint(spec.neighbours, one.shape, device=run.device)]
        both = torch.cat([one, two])
        ours = student(images[both])
        theirs = together(images[both]) if cached is None else cached[both]
        if spec.loss == "features":
            loss = F.mse_loss(head(ours.permute(0, 2, 3, 1)), theirs.permute(0, 2, 3, 1)) * theirs.shape[1]
        else:
            n = len(one)
            loss = distillation_loss((ours[:n], ours[n:]), (theirs[:n], theirs[n:]), spec.tau, spec.form)
        _update(optimizer, loss, spec.lr * min(1.0, (i + 1) / WARMUP) * (1.0 if i < spec.steps / 2 else 0.1))
        return {"loss": loss.detach()}

    return run.loop(DISTIL, {"student": student, "head": head, "optimizer": optimizer}, step, spec.steps)


def _refine(run: Run, config: Config, spec: RefineSpec, student: PatchNetwork, train: Pictures) -> float:
    """Seconds of the refinement."""
    student.train()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=spec.lr, weight_decay=spec.weight_decay)
    count = config.views.train_views
    size = (train.side, train.side)

    def step(i: int) -> dict[str, Tensor]:
        one = torch.randint(len(train), (spec.batch_size,), device=run.device)
        within_body = (one % count + torch.randint(1, count, one.shape, device=run.device)) % count
        two = one - one % count + within_body
        here, there, counted = matched_pixels(train, one, two, spec.points, spec.tolerance)
        source, target = student(train.images[torch.cat([one, two])]).chunk(2)
        grid = (source.shape[2], source.shape[3])
        index = nearest_cells(cells(here + 0.5, size, grid) - 0.5, grid)
        places = cells(there + 0.5, size, grid) - 0.5
        if spec.loss == "blur":
            loss = blur_loss(source, target, index, nearest_cells(places, grid), spec.tau, spec.kernel, counted=counted)
        else:
            places = places + spec.jitter * torch.randn_like(places)
            loss = soft_argmax_loss(source, target, index, places, spec.beta, counted)
        _update(optimizer, loss, spec.lr)
        return {"loss": loss.detach(), "points": counted.float().mean()}

    return run.loop(REFINE, {"student": student, "optimizer": optimizer}, step, spec.steps)


def found_points(features: Features, pictures: Pictures, pairs: Tensor, window: int = 0) -> tuple[Tensor, Tensor]:
    """(pairs, P, 2) where points of the first images are found in the second; and (pairs, P) bool, which points both
    show."""
    was = features.training if isinstance(features, nn.Module) else False
    if isinstance(features, nn.Module):
        features.eval()
    maps, size = _in_parts(features, pictures.images), (pictures.side, pictures.side)
    found = []
    for some in pairs.split(8):
        one, two = some.T
        found.append(correspondences(maps[one], maps[two], pictures.points[one], (size, size), window).float())
    if isinstance(features, nn.Module):
        features.train(was)
    return torch.cat(found), pictures.visible[pairs[:, 0]] & pictures.visible[pairs[:, 1]]


def _pck(features: Features, pictures: Pictures, pairs: Tensor, window: int = 0) -> float:
    """The mean over pairs of the share of points within a tenth of the longer side of what the second image shows."""
    found, counted = found_points(features, pictures, pairs, window)
    two = pairs[:, 1]
    right = within(found, pictures.points[two], PCK * reach_of(pictures.depth)[two][:, None])
    return float(((right & counted).sum(1) / counted.sum(1)).mean())


def _compared(student: PatchNetwork, together: Features, test: Pictures, pairs: Tensor) -> dict[str, float]:
    """How alike similarities of student and teachers are; and what a pair takes."""
    some = pairs[: min(len(pairs), 24)]
    ours, theirs = (
        similarity(*(_in_parts(f, test.images[some[:, i]]) for i in range(2))).flatten(1) for f in (student, together)
    )
    ours, theirs = (x - x.mean(1, keepdim=True) for x in (ours, theirs))
    correlation = F.cosine_similarity(ours, theirs, dim=1).mean()
    images = test.images[pairs[0]]
    ours_ms, theirs_ms = _milliseconds(student, images), _milliseconds(together, images)
    return {
        "similarity_correlation": float(correlation),
        "pair_ms": ours_ms,
        "pair_ms_teachers": theirs_ms,
        "pair_gain": theirs_ms / ours_ms,
    }


@torch.no_grad()
def _milliseconds(features: Features, images: Tensor, repeats: int = 9) -> float:
    """The median time of the features of a pair."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        features(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begun))
    return sorted(times)[repeats // 2]


def _draw(run: Run, test: Pictures, pairs: Tensor, networks: dict[str, Callable[[Tensor], Tensor]]) -> None:
    """Pictures of test pairs: their points, and where each network finds them."""
    shown = pairs[torch.linspace(0, len(pairs) - 1, min(SHOWN, len(pairs))).long().unique().to(pairs.device)]
    columns: dict[str, tuple[list[Tensor], list[str]]] = {"truth": ([], [])}
    reach = PCK * reach_of(test.depth)
    for name, network in (("truth", None), *networks.items()):
        pictures, captions = columns.setdefault(name, ([], []))
        found, counted = found_points(network or next(iter(networks.values())), test, shown)
        for (one, two), places, both in zip(shown.tolist(), found.cpu(), counted.cpu()):
            truth = test.points[two].cpu()[both]
            at = truth if network is None else places[both]
            images = (test.images[one].cpu(), test.images[two].cpu())
            pictures.append(with_points(images, (test.points[one].cpu()[both], at)))
            right = int(within(at, truth, float(reach[two])).sum())
            captions.append(f"{int(both.sum())} points" if network is None else f"{right} of {int(both.sum())} found")
    write_pictures(run.folder / FOLDER, columns, range(len(shown)), compared=False)


@evaluates(ImageMatcher.kind)
def evaluate(product: ImageMatcher, run: Run) -> dict[str, float]:
    """`pck`: of the run's network on its test pairs, also less that of its teachers; and its size."""
    config = run.config
    assert isinstance(config, Config)
    test = _pictures(run, config, False)
    pairs = test_pairs(test, config.views)
    module = product.module
    found = _pck(module, test, pairs, product.window)
    figures = {"pck": found, "parameters": float(sum(p.numel() for p in module.parameters()))}
    if "pck_teachers" in product.figures:
        figures["pck_over_teachers"] = found - product.figures["pck_teachers"]
    return figures
