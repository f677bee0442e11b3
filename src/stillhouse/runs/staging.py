"""`RunStages`: cached stages, fits and loops, all in a run's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stillhouse.config.specs import MethodConfig, TrainSpec
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.files import cache_folder
from stillhouse.runs.data import RunData
from stillhouse.runs.method import Stage
from stillhouse.runs.stages import cached, place
from stillhouse.training.display import Display
from stillhouse.training.engine import FitResult, fit
from stillhouse.training.loop import loop
from stillhouse.training.module import TrainingModule

T = TypeVar("T")


class RunStages(RunData):
    """Data, and work whose result is stored: stages, fits, loops.

    Args:
        folder: the run's own folder; None for a plan, which writes nothing.
        config, data_root, bundles: of `RunData`.
        live: the display.
        cpu: stay on the CPU.
    """

    def __init__(
        self,
        folder: Path | None,
        config: MethodConfig,
        *,
        data_root: str | None = None,
        live: Display | None = None,
        cpu: bool = False,
        bundles: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, data_root, bundles)
        self._folder, self.live, self.cpu = folder, live or Display(), cpu
        self.planned: set[str] | None = None
        self.record: dict[str, Any] = {}  # further facts for environment.json and the report
        self.live_teachers: list[FrozenTeacher] = []  # for the pictures of the report

    @property
    def folder(self) -> Path:
        assert self._folder is not None, "a plan writes nothing"
        return self._folder

    @property
    def device(self) -> torch.device:
        """Where this run's networks are, as `--device` demands, else the first that torch sees."""
        from accelerate import PartialState

        return torch.device("cpu") if self.cpu else torch.device(PartialState().device)

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Inside, the run's seed is another: that of a stage which runs with other seeds share."""
        outer, self.seed = self.seed, seed
        try:
            yield
        finally:
            self.seed = outer

    def stage(self, stage: str | Stage, make: Callable[[], T], uses: Mapping[str, Any], *, shared: bool = True) -> T:
        """The result of `make()`, stored under a hash of `uses` and reused by every run that uses the same.

        Inside `make`, `run.folder` is the stage's own folder, so that a fit that was interrupted resumes. The result
        may be a mapping of tensors, plain JSON data, or a mapping of those two. Two processes that want the same stage
        take turns.

        Args:
            stage: one of the plan's, or its name (an index may follow a dot: `expert.3`).
            uses: everything that the result depends on: JSON data, specs, data, teachers, networks, tensors, files (see
                `stillhouse.runs.stages.as_json`).
            shared: store it in the cache for other runs; False: in the run's folder.

        Raises:
            UserError: a stage that is not in the plan, or a value in `uses` that has no hash.
        """
        name = str(stage)
        if self.planned is not None and name.split(".")[0] not in self.planned:
            raise UserError(f"The stage '{name}' is not in the method's plan ({', '.join(sorted(self.planned))}).")

        def inside(folder: Path) -> T:
            outer, self._folder = self._folder, folder
            try:
                return make()
            finally:
                self._folder = outer

        return cached((cache_folder() if shared else self.folder) / "stages", name, inside, uses, self.live.say)

    def files(self, stage: str | Stage, make: Callable[[], None], uses: Mapping[str, Any]) -> Path:
        """A stage whose result is files, too large to be held in memory: the folder in which they are stored.

        Args:
            make: writes them into `run.folder`; a call that was interrupted finds there what it had written.
            uses: as of `stage`.
        """
        made: list[Path] = []

        def inside() -> dict[str, Any]:
            made.append(self.folder)
            make()
            return {"files": True}

        self.stage(stage, inside, uses)
        if made:
            return made[0].with_name(made[0].name.removesuffix(".partial"))
        return place(cache_folder() / "stages", str(stage), uses)

    def fit(
        self,
        stage: str | Stage,
        module: TrainingModule,
        train: Any,
        spec: TrainSpec,
        *,
        evaluate: Callable[..., dict[str, float]] | None = None,
        splits: Mapping[str, Any] | None = None,
    ) -> FitResult:
        """Train a module over a loader (see `stillhouse.training.engine.fit`) in this run's folder."""
        return fit(
            module,
            train,
            spec,
            folder=self.folder,
            stage=str(stage),
            seed=self.seed,
            evaluate=evaluate,
            splits=splits,
            live=self.live,
            cpu=self.cpu,
        )

    def last_step(
        self, module: TrainingModule, train: Any, spec: TrainSpec, splits: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        """A batch on the device and the context of a fit's last epoch, to measure a further step by (see
        `evaluation.cost.step_cost`)."""
        from stillhouse.distillation.objective import Progress
        from stillhouse.signals import to_device
        from stillhouse.training.context import TrainingContext

        device = next(p.device for p in module.parameters())
        progress = Progress(epoch=spec.epochs - 1, steps_per_epoch=len(train), epochs=spec.epochs)
        batch = to_device(next(iter(train.batches(spec.epochs - 1, 0, spec.epochs))), device)
        return batch, TrainingContext(module, progress, splits, self.seed, device, self.folder, train)

    def loop(
        self,
        stage: str | Stage,
        state: Mapping[str, Any],
        step: Callable[[int], Mapping[str, Tensor]],
        steps: int,
        **options: Any,
    ) -> float:
        """The same loop where there is no loader (see `stillhouse.training.loop.loop`)."""
        return loop(self.folder, str(stage), state, step, steps, seed=self.seed, live=self.live, **options)
