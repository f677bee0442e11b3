"""`Method`: the class that a paper's procedure fills in; and `Stage`, a line of its plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin

from stillhouse.config.specs import MethodConfig

C = TypeVar("C", bound=MethodConfig)


@dataclass
class Stage:
    """A line of a plan: what will be done, shown by --dry-run. As text it is its name.

    A method names each stage once, above its class, and fills in the rest in its plan: `TEACHER = Stage("teacher",
    "train the teacher (shared)")`, in `plan` `TEACHER.filled(steps=100)`, in `run` `run.stage(TEACHER, …)`.
    """

    name: str
    does: str
    models: dict[str, str] = field(default_factory=dict)  # role -> "timm:x, 0.27 M parameters"
    taps: dict[str, str] = field(default_factory=dict)
    steps: int | None = None

    def filled(self, **facts: Any) -> Stage:
        """The same stage with what the recipe decides: `does`, `models`, `taps`, `steps`."""
        return replace(self, **facts)

    def __str__(self) -> str:
        return self.name


class Method(Generic[C]):
    """A paper's whole procedure, a subclass of `Method[Config]`, where Config is the whole recipe. `plan` lists the
    stages; `run` does the work, top to bottom."""

    Config: ClassVar[type[MethodConfig]]
    searches: ClassVar[bool] = False
    """Whether it chooses the student's network, so that the number of parameters may vary with the seed."""

    unlabelled: ClassVar[bool] = False
    """Whether it reads `data.unlabelled`; other methods refuse the key."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for base in vars(cls).get("__orig_bases__", ()):
            if isinstance(get_origin(base), type) and issubclass(get_origin(base), Method):
                config = get_args(base)[0]
                cls.Config = getattr(config, "__bound__", config)  # of a type variable, its bound

    def plan(self, config: C, run: Any) -> list[Stage]:
        """The stages, in order; `run.stage` refuses a name that is not among them. Trains nothing."""
        raise NotImplementedError

    def run(self, config: C, run: Any) -> Any:
        """Do the work and return a product."""
        raise NotImplementedError
