"""The authors' own loops of DataDAM, NCFM and MTT, from checkouts, on images that they are given: each stops where an
iteration begins.

Nothing of theirs is here. What their loops do beside an iteration (data sets from disk, evaluation, logging services)
is taken out by names of their modules, NCFM's background threads load in the foreground so that their time counts, and
libraries that they import and do not use here need not be installed.
"""

from __future__ import annotations

import importlib
import random
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor, nn

ENDLESS = 10**9
UNUSED = (
    "kornia",
    "einops",
    "einops.layers",
    "einops.layers.torch",
    "efficientnet_pytorch",
    "matplotlib",
    "matplotlib.pyplot",
)
Begins = Callable[[], None]
"""Called by a loop where an iteration begins."""


class PeerImages:
    """Training images that a peer takes as its data set.

    Args:
        images: (N, C, H, W), as networks see them.
        labels: (N,) class ids, of `classes`.
        pixels: (N, C, H, W) in [0, 1].
        experts: trajectories (epochs + 1, P) in the order of `parameters()`, which is the same in all these ConvNets.
    """

    def __init__(self, images: Tensor, labels: Tensor, pixels: Tensor, classes: int, experts: list[Tensor]) -> None:
        self.images, self.labels, self.pixels, self.classes, self.experts = images, labels, pixels, classes, experts

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[-2], self.images.shape[-1]


def datadam(config: Any, real: PeerImages, folder: Path, scratch: Path, begins: Begins) -> None:
    """`main` of main_DataDAM.py."""
    module = _module(folder, "main_DataDAM")
    nn.Module.cuda = lambda self, *_: self  # type: ignore[method-assign]  # which it calls whatever the machine
    given = list(zip(real.images, real.labels.tolist()))
    names = [str(c) for c in range(real.classes)]
    module.get_dataset = lambda *_: (3, real.size, real.classes, names, None, None, given, None, None, None)
    module.get_eval_pool = lambda *_: []
    module.get_network = _first(begins, module.get_network)
    options = {
        "ipc": config.ipc,
        "batch_real": config.batch_real,
        "lr_img": config.lr,
        "dsa_strategy": config.augment.groups,
        "eval_mode": "none",
    }
    options |= {"Iteration": ENDLESS, "data_path": scratch, "save_path": scratch}
    sys.argv = ["main_DataDAM.py", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    module.main()


def mtt(config: Any, real: PeerImages, folder: Path, scratch: Path, begins: Begins) -> None:
    """`main` of distill.py, with our experts as its replay buffer."""
    service: Any = MagicMock()

    def init(config: Namespace, **_: Any) -> None:
        service.config._items = vars(config)

    def log(found: dict[str, Any], **_: Any) -> None:
        if "Progress" in found:
            begins()

    service.init, service.log = init, log
    sys.modules["wandb"] = service
    module = _module(folder, "distill")
    given = list(zip(real.images, real.labels.tolist()))
    same = {c: c for c in range(real.classes)}
    module.get_dataset = lambda *_, **__: (
        3,
        real.size,
        real.classes,
        list(same),
        None,
        None,
        given,
        None,
        None,
        None,
        same,
        same,
    )
    module.get_eval_pool = lambda *_: []
    like = list(
        importlib.import_module("networks")
        .ConvNet(3, real.classes, 128, 3, "relu", "instancenorm", "avgpooling")
        .parameters()
    )
    buffer = [
        [[p.view_as(q) for p, q in zip(row.split([q.numel() for q in like]), like)] for row in path]
        for path in real.experts
    ]
    kept = scratch / "CIFAR10_NO_ZCA" / "ConvNet"
    kept.mkdir(parents=True)
    torch.save(buffer, kept / "replay_buffer_0.pt")
    published = Namespace(
        zca=False,
        texture=False,
        max_experts=None,
        max_files=None,
        dsa="True",
        dataset="CIFAR10",
        data_path="",
        batch_real=256,
    )
    published.__dict__ |= {
        "subset": "",
        "eval_mode": "S",
        "model": "ConvNet",
        "pix_init": "real",
        "load_all": True,
        "no_aug": False,
        "eval_it": -1,
    }
    published.__dict__ |= {
        "ipc": config.ipc,
        "batch_syn": config.batch_syn,
        "lr_img": config.lr,
        "lr_lr": config.lr_lr,
        "lr_teacher": config.inner_lr,
    }
    published.__dict__ |= {
        "dsa_strategy": config.augment.groups,
        "expert_epochs": config.expert_epochs,
        "syn_steps": config.inner_steps,
    }
    published.__dict__ |= {"max_start_epoch": config.max_start + 1, "Iteration": ENDLESS, "buffer_path": str(scratch)}
    module.main(published)


def ncfm(config: Any, real: PeerImages, folder: Path, scratch: Path, begins: Begins) -> None:
    """`Condenser.condense`, as condense_script.py calls it."""
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    module = _module(folder, "condenser.Condenser")
    module.AsyncLoader = ForegroundLoader
    module.gather_save_visualize = lambda *_, **__: None
    module.update_feature_extractor = _first(begins, module.update_feature_extractor)
    tools, loaders = importlib.import_module("utils.utils"), importlib.import_module("data.dataloader")
    networks = [importlib.import_module("models.convnet").ConvNet(real.classes) for _ in range(3)]
    for number, path in enumerate(real.experts):
        for what, row in (("init", path[0]), ("trained", path[-1])):
            nn.utils.vector_to_parameters(row, networks[0].parameters())
            torch.save(networks[0].state_dict(), scratch / f"premodel{number}_{what}.pth.tar")
    quiet = lambda *_, **__: None  # noqa: E731
    args = Namespace(
        ipc=config.ipc,
        factor=config.factor,
        decode_type="single",
        batch_real=config.batch_real,
        device="cpu",
        logger=quiet,
        rank=1,
    )
    args.__dict__ |= {
        "class_list": list(range(real.classes)),
        "nclass": real.classes,
        "alpha_for_loss": config.alpha,
        "beta_for_loss": config.beta,
    }
    args.__dict__ |= {
        "sampling_net": False,
        "local_rank": 1,
        "niter": ENDLESS,
        "depth": 3,
        "iter_calib": 1,
        "calib_weight": config.calibration,
    }
    args.__dict__ |= {
        "num_freqs": config.frequencies,
        "num_premodel": len(real.experts),
        "pretrain_dir": str(scratch),
        "it_save": [],
        "it_log": ENDLESS,
    }
    args.__dict__ |= {"dataset": "cifar10", "aug_type": config.augment.always, "mixup": "cut", "dis_metrics": "NCFM"}
    loader = loaders.ClassMemDataLoader(NcfmImages(real), config.batch_real, device="cpu")
    condenser = module.Condenser(args, args.class_list, 3, *real.size, device="cpu")
    condenser.load_condensed_data(loader, "mix")
    optimizer = tools.get_optimizer(
        optimizer="adamw",
        parameters=condenser.parameters(),
        lr=0.001,
        mom_img=0.5,
        weight_decay=config.weight_decay,
        logger=quiet,
    )
    aug, _ = importlib.import_module("utils.diffaug").diffaug(args, device="cpu")
    start, between, final = networks
    condenser.condense(args, MagicMock(), loader, aug, optimizer, start, between, final)


PEERS: dict[str, tuple[Callable[[Any, PeerImages, Path, Path, Begins], None], str]] = {
    "datadam": (datadam, "DataDistillation/DataDAM"),
    "ncfm": (ncfm, "gszfwsb/NCFM"),
    "mtt": (mtt, "GeorgeCazenavette/mtt-distillation"),
}
"""Method -> (its authors' loop, which ends by an exception out of `begins`; the repository)."""


class NcfmImages:
    """A data set as NCFM's loader of images in memory reads it."""

    def __init__(self, real: PeerImages) -> None:
        self.pixels, self.targets, self.nclass = real.pixels, real.labels.tolist(), real.classes

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i >= len(self):
            raise IndexError(i)
        return self.pixels[i], self.targets[i]


class ForegroundLoader:
    """In the place of NCFM's `AsyncLoader`: the same loading, when it is asked for, by the thread that asks."""

    def __init__(self, loader: Any, class_list: list[int], batch_size: int, device: str) -> None:
        self.loader, self.batch_size = loader, batch_size

    def class_sample(self, c: int) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.loader.class_sample(c, self.batch_size)
        return found


def _module(folder: Path, name: str) -> Any:
    """A module of a checkout, imported as its scripts are: with the checkout first on the path."""
    for unused in UNUSED:
        try:
            importlib.import_module(unused)
        except ImportError:
            sys.modules[unused] = MagicMock()
    sys.path.insert(0, str(folder))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return importlib.import_module(name)


def _first(begins: Begins, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with `begins` before it."""

    def both(*given: Any, **named: Any) -> Any:
        begins()
        return function(*given, **named)

    return both
