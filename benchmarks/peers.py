"""The losses of other libraries and of papers' authors, on the same signals and with the weights of our objective, for
benchmarks/losses.py.

Nothing of theirs is here: torchdistill is a package (extra `bench`), the others are imported from checkouts.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.functional.feature_maps import LAST_STAGES, pooled_tap
from stillhouse.objectives.ofa_kd import ofa_loss
from stillhouse.signals import Batch, Signals

CLASSES, TRAINING = 100, 50_000  # CIFAR-100's counts
SHAPES = ((64, 32, 32), (128, 16, 16), (256, 8, 8))  # of resnet32x4's and resnet8x4's stages at 32 px
Loss = Callable[[], Tensor]


@dataclass
class LossInputs:
    """What both sides compute on."""

    student: Signals
    teacher: Signals
    batch: Batch

    @property
    def maps(self) -> tuple[list[Tensor], list[Tensor]]:
        """The student's and the teacher's stages, shallow to deep."""
        return [self.student.taps[s] for s in LAST_STAGES], [self.teacher.taps[s] for s in LAST_STAGES]

    @property
    def dictionaries(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The signals as torchdistill passes them."""
        out = []
        for side in (self.student, self.teacher):
            named = {**side.taps, "logits": side.logits, "embedding": side.embedding}
            out.append({name: {"output": value} for name, value in named.items()})
        return out[0], out[1]


def torchdistill(name: str, on: LossInputs, objective: Any, folder: Path | None) -> Loss:
    """torchdistill's mid-level losses, whose constructors take the paths of what they read."""
    from torchdistill.losses import mid_level

    student, teacher = on.dictionaries
    logits = {
        "student_module_path": "logits",
        "student_module_io": "output",
        "teacher_module_path": "logits",
        "teacher_module_io": "output",
    }
    embeddings = {**logits, "student_module_path": "embedding", "teacher_module_path": "embedding"}
    paths = {"student_output_path": "embedding", "teacher_output_path": "embedding"}
    pair = lambda path: {"io": "output", "path": path}  # noqa: E731
    pairs = {s: {"student": pair(s), "teacher": pair(s), "weight": 1} for s in LAST_STAGES}
    plain: dict[str, Callable[[], nn.Module]] = {
        "kd": lambda: mid_level.KDLoss(**logits, temperature=4.0, beta=1.0),
        "logit_standardisation": lambda: mid_level.LogitStdKDLoss(**logits, temperature=2.0, beta=1.0),
        "dist": lambda: mid_level.DISTLoss(**logits),
        "at": lambda: mid_level.ATLoss(pairs),
        "pkt": lambda: mid_level.PKTLoss(**embeddings),
        "rkd": lambda: mid_level.RKDLoss(**paths, dist_factor=25.0, angle_factor=50.0, reduction="mean"),
        "sp": lambda: mid_level.SPKDLoss("stage:-1", "stage:-1", "batchmean"),
    }
    if name in plain:
        module = plain[name]()
        return lambda: module(student, teacher)
    if name == "fitnet":
        told = {"is_from_teacher": True, "module_path": "stage:-2", "io": "output"}
        hint = mid_level.SimpleLossWrapper(
            nn.MSELoss(), input={"is_from_teacher": False, "module_path": "hint", "io": "output"}, target=told
        )
        return lambda: hint({"hint": {"output": objective.regressor(on.student.taps["stage:2"])}}, teacher, None)
    from torchdistill.models import wrapper

    if name == "vid":
        losses = mid_level.VIDLoss({s: {"student": pair(s), "teacher": pair(s), "weight": 1} for s in LAST_STAGES})
        regressors = [wrapper.Regressor4VID(c, c, c, objective.eps, objective.initial_variance) for c, _, _ in SHAPES]
        for theirs, mine in zip(regressors, objective.regressors):
            theirs.regressor.load_state_dict(mine.state_dict())
        return lambda: losses(
            {s: {"output": r(student[s]["output"])} for s, r in zip(LAST_STAGES, regressors)}, teacher
        )
    if name == "review_kd":
        fusions = _fusions(wrapper.AttentionBasedFusion, objective, "attention_conv")
        hcl = mid_level.HierarchicalContextLoss("f", "output", "f", "output")
        told_maps = [*on.maps[1], on.teacher.embedding[:, :, None, None]]  # type: ignore[index]

        def review() -> Tensor:
            passed, terms = None, []
            for fusion, x, t in reversed(
                list(zip(fusions, [*on.maps[0], on.student.embedding[:, :, None, None]], told_maps))
            ):  # type: ignore[index]
                predicted, passed = fusion(x, passed, x.shape[2])
                terms.append(hcl({"f": {"output": (predicted, None)}}, {"f": {"output": t}}))
            return torch.stack(terms).sum()

        return review
    raise KeyError(name)


def mdistiller(name: str, on: LossInputs, objective: Any, folder: Path | None) -> Loss:
    """MDistiller's functions; it is the authors' own code for DKD."""
    module = importlib.import_module(
        f"mdistiller.distillers.{ {'review_kd': 'ReviewKD', 'fitnet': 'FitNet'}.get(name, name.upper()) }"
    )
    (z, v), (f_s, f_t) = (on.student.logits, on.teacher.logits), on.maps
    e_s, e_t = on.student.embedding, on.teacher.embedding
    plain: dict[str, Loss] = {
        "kd": lambda: module.kd_loss(z, v, 4.0),
        "dkd": lambda: module.dkd_loss(z, v, on.batch["label"], 1.0, 8.0, 4.0),
        "at": lambda: module.at_loss(f_s, f_t, 2),
        "nst": lambda: module.nst_loss(f_s, f_t),
        "sp": lambda: module.sp_loss([f_s[-1]], [f_t[-1]]),
        "rkd": lambda: module.rkd_loss(e_s, e_t),
        "pkt": lambda: module.pkt_loss(e_s, e_t),
    }
    if name in plain:
        return plain[name]
    if name == "vid":
        stages = list(zip(objective.regressors, objective.log_scales, f_s, f_t))
        return lambda: torch.stack([module.vid_loss(*stage, objective.eps) for stage in stages]).sum()
    if name == "crd":
        theirs = module.CRD.__new__(module.CRD)  # its own constructor wants networks and a configuration
        nn.Module.__init__(theirs)
        with _on_cpu():
            theirs.init_crd_modules(256, 256, objective.width, TRAINING, objective.negatives)
        index, candidates = _same_memories(theirs.contrast, theirs.embed_s, theirs.embed_t, objective, on)
        return lambda: theirs.crd_loss(e_s, e_t, index, candidates)
    fusions = _fusions(module.ABF, objective, "att_conv")
    told = [*f_t, e_t[:, :, None, None]]  # type: ignore[index]

    def review() -> Tensor:
        passed, results = None, []
        for fusion, x, t in reversed(list(zip(fusions, [*f_s, e_s[:, :, None, None]], told))):  # type: ignore[index]
            predicted, passed = fusion(x, passed, x.shape[2], t.shape[2])
            results.insert(0, predicted)
        return module.hcl_loss(results, told)

    return review


def repdistiller(name: str, on: LossInputs, objective: Any, folder: Path | None) -> Loss:
    """RepDistiller's criteria; it is the authors' own code for CRD."""
    zoo = importlib.import_module("distiller_zoo")
    f_s, f_t = on.maps
    if name == "vid":
        criteria = [zoo.VIDLoss(c, c, c, objective.initial_variance, objective.eps) for c, _, _ in SHAPES]
        for theirs, mine in zip(criteria, objective.regressors):
            theirs.regressor.load_state_dict(mine.state_dict())
        return lambda: torch.stack([c(s, t) for c, s, t in zip(criteria, f_s, f_t)]).sum()
    if name == "crd":
        options = types.SimpleNamespace(
            s_dim=256,
            t_dim=256,
            feat_dim=objective.width,
            nce_k=objective.negatives,
            nce_t=0.07,
            nce_m=0.5,
            n_data=TRAINING,
        )
        with _on_cpu():
            crd = importlib.import_module("crd.criterion").CRDLoss(options)
        index, candidates = _same_memories(crd.contrast, crd.embed_s, crd.embed_t, objective, on)
        return lambda: crd(on.student.embedding, on.teacher.embedding, index, candidates)
    if name in ("at", "nst", "sp"):
        criterion = {"at": zoo.Attention, "nst": zoo.NSTLoss, "sp": zoo.Similarity}[name]()
        last = slice(-1, None) if name == "sp" else slice(None)
        return lambda: torch.stack([x.sum() for x in criterion(f_s[last], f_t[last])]).sum()
    embedded = {"pkt": zoo.PKT, "rkd": lambda: zoo.RKDLoss(25, 50)}[name]()
    return lambda: embedded(on.student.embedding, on.teacher.embedding)


def cls_kd(name: str, on: LossInputs, objective: Any, folder: Path | None) -> Loss:
    """The authors' NKD and USKD, without the framework they are registered in."""
    assert folder is not None
    registry: Any = types.ModuleType("mmcls.registry")
    registry.MODELS = types.SimpleNamespace(register_module=lambda: lambda made: made)
    sys.modules.setdefault("mmcls", types.ModuleType("mmcls"))
    sys.modules.setdefault("mmcls.registry", registry)
    module = _load(folder / "mmcls" / "models" / "dis_losses" / f"{name}.py")
    if name == "nkd":
        nkd = module.NKDLoss("nkd", True)
        return lambda: nkd(on.student.logits, on.teacher.logits, on.batch["label"])
    with _on_cpu():
        uskd = module.USKDLoss("uskd", True, channel=SHAPES[1][0], num_classes=CLASSES)
    uskd.fc.load_state_dict(objective.weak.state_dict())
    return lambda: uskd(pooled_tap(on.student, "stage:-2"), on.student.logits, on.batch["label"])


def ofakd(name: str, on: LossInputs, objective: Any, folder: Path | None) -> Loss:
    """The authors' OFA loss of one stage's logits."""
    theirs = importlib.import_module("distillers.ofa").ofa_loss
    mask = nn.functional.one_hot(on.batch["label"], CLASSES)
    return lambda: theirs(on.student.logits, on.teacher.logits, mask, 1.5, 1.0)


def one_stage_of_ofa(on: LossInputs) -> Loss:
    """Our side of `ofakd`: the loss of one stage's logits, without its projector."""
    return lambda: ofa_loss(on.student.logits, on.teacher.logits, on.batch["label"], eps=1.5)  # type: ignore[arg-type]


def nd(name: str, on: LossInputs, objective: Any, folder: Path | None) -> Loss:
    """The authors' ND, which reads class means as lists."""
    assert folder is not None
    theirs = _load(folder / "CIFAR" / "utils.py").DirectNormLoss(CLASSES)
    means = {str(i): row for i, row in enumerate(objective.means.tolist())}

    def loss() -> Tensor:
        with _on_cpu():
            value: Tensor = theirs(on.student.embedding, on.teacher.embedding, means, on.batch["label"])
        return value

    return loss


@dataclass(frozen=True)
class Peer:
    """Where losses come from.

    Attributes:
        title: how the page calls it.
        make: the loss of an objective by name.
        losses: objectives it has, with what its value is to be multiplied by to be ours.
        authors: of which of them it is the code of the paper's own authors.
    """

    title: str
    make: Callable[[str, LossInputs, Any, Path | None], Loss]
    losses: dict[str, float]
    authors: frozenset[str] = frozenset()


PEERS = {
    "torchdistill": Peer(
        "torchdistill",
        torchdistill,
        {
            "kd": 16,
            "logit_standardisation": 4,
            "dist": 1,
            "fitnet": 1,
            "at": 1,
            "sp": 1,
            "rkd": 1,
            "pkt": 1,
            "vid": 1,
            "review_kd": 1,
        },
    ),
    "mdistiller": Peer(
        "MDistiller",
        mdistiller,
        dict.fromkeys(["kd", "dkd", "at", "nst", "sp", "rkd", "pkt", "vid", "crd", "review_kd"], 1),
        frozenset({"dkd"}),
    ),
    "repdistiller": Peer(
        "RepDistiller",
        repdistiller,
        dict.fromkeys(["at", "nst", "sp", "rkd", "pkt", "vid", "crd"], 1),
        frozenset({"crd"}),
    ),
    "cls_kd": Peer("cls_KD", cls_kd, {"nkd": 1, "uskd": 1}, frozenset({"nkd", "uskd"})),
    "ofakd": Peer("OFAKD", ofakd, {"ofa_kd": 1}, frozenset({"ofa_kd"})),
    "nd": Peer("KD++", nd, {"nd": 1}, frozenset({"nd"})),
}


def _fusions(make: Callable[..., nn.Module], objective: Any, attention: str) -> list[nn.Module]:
    """Another's fusion modules with the weights of our review_kd."""
    made = []
    for mine in objective.fusions:
        state = {k.replace("att_conv", attention): v for k, v in mine.state_dict().items()}
        inwards, outwards = state["conv1.0.weight"].shape, state["conv2.0.weight"].shape
        made.append(make(inwards[1], inwards[0], outwards[0], mine.att_conv is not None))
        made[-1].load_state_dict(state)
    return made


def _same_memories(contrast: Any, embed_s: Any, embed_t: Any, objective: Any, on: LossInputs) -> tuple[Tensor, Tensor]:
    """Our CRD's memories and embeddings into another's; the batch's indices, and candidates as ours draws after
    `torch.manual_seed(1)`."""
    for theirs, mine in (
        (contrast.memory_v1, objective.memory_student),
        (contrast.memory_v2, objective.memory_teacher),
    ):
        theirs.copy_(mine)
    embed_s.linear.load_state_dict(objective.embed_student.state_dict())
    embed_t.linear.load_state_dict(objective.embed_teacher.state_dict())
    torch.manual_seed(1)
    index = on.batch["index"]
    return index, torch.cat([index[:, None], objective.sampler.draw(index, objective.negatives)], dim=1)


@contextmanager
def _on_cpu() -> Iterator[None]:
    """Inside, `.cuda()` leaves a tensor where it is: some authors call it whatever the machine."""
    before = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *given, **named: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = before  # type: ignore[method-assign]


def _load(path: Path) -> types.ModuleType:
    """A module from one file of a checkout."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
