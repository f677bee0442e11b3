"""What `stillhouse doctor` prints: versions, devices, folders, and which extras are missing and what each is for.

Nothing here needs torch to be importable, as a broken installation is what such a report is for. Secrets are left out,
and the home folder is written as `~`, so that the text can be pasted into a bug report.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from stillhouse.files import cache_folder

PURPOSES = {
    "text": "language models, text classifiers, networks and data named hf:, the Trainer of transformers",
    "peft": "LoRA adapters of language models",
    "graph": "graph networks and graph sets of torch_geometric",
    "lightning": "the Trainer of Lightning",
    "codec": "range coder of Entropic Student's bitstream",
    "detection": "average precision of detectors",
    "onnx": "export to ONNX",
    "ray": "comparisons and stores over a Ray cluster",
    "trackers": "TensorBoard logs",
    "wandb": "Weights & Biases logs",
    "mlflow": "MLflow logs",
}
"""Extra -> what it is for. Extras that only developers need (test, bench, dev) are not named."""


@dataclass(frozen=True)
class Requirement:
    """A library that Stillhouse needs, or that one of its extras names."""

    name: str
    wanted: str  # such as `>=2.6`
    installed: str | None  # its version
    fits: bool

    def __str__(self) -> str:
        if self.installed is None:
            return f"{self.name}{self.wanted} is missing"
        return f"{self.name} {self.installed}" + ("" if self.fits else f" (needs {self.wanted})")


def requirements(distribution: str = "stillhouse") -> dict[str, list[Requirement]]:
    """What the installed package declares: extra -> libraries, and under "" those that are always needed.

    Empty where the package is not installed and only on the path.
    """
    from packaging.requirements import Requirement as Declared

    try:
        declared = [Declared(text) for text in requires(distribution) or ()]
    except PackageNotFoundError:
        return {}
    out: dict[str, list[Requirement]] = {}
    for extra in ("", *PURPOSES):
        found = [d for d in declared if _belongs(d.marker, extra)]
        out[extra] = [_look(d.name, d.specifier) for d in found]
    return out


def _belongs(marker: object, extra: str) -> bool:
    from packaging.markers import Marker

    if not isinstance(marker, Marker):
        return not extra
    return marker.evaluate({"extra": extra}) and not (extra and marker.evaluate({"extra": ""}))


def _look(name: str, specifier: object) -> Requirement:
    from packaging.specifiers import SpecifierSet

    assert isinstance(specifier, SpecifierSet)
    try:
        found = version(name)
    except PackageNotFoundError:
        return Requirement(name, str(specifier), None, False)
    return Requirement(name, str(specifier), found, specifier.contains(found, prereleases=True))


def report(data_root: str | None = None) -> Iterator[str]:
    """The lines of the report.

    Args:
        data_root: the folder of data sets that was given; default: STILLHOUSE_DATA.
    """
    import stillhouse

    known = requirements()
    yield f"stillhouse {stillhouse.__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield from _needed(known.get("", []))
    yield from ("", "Devices", *(f"  {line}" for line in devices()))
    yield from ("", "Folders", *(f"  {line}" for line in folders(data_root)))
    yield from ("", "Extras", *(f"  {line}" for line in _extras(known)))


def _needed(needed: list[Requirement]) -> Iterator[str]:
    if not needed:
        yield "Stillhouse is on the path but not installed, so what it needs is unknown: pip install stillhouse."
        return
    yield "  " + ", ".join(str(r) for r in needed if r.fits)
    for requirement in needed:
        if not requirement.fits:
            yield f"  PROBLEM: {requirement}; pip install '{requirement.name}{requirement.wanted}'"


def _extras(known: dict[str, list[Requirement]]) -> Iterator[str]:
    width = max(map(len, PURPOSES))
    for extra, purpose in PURPOSES.items():
        wrong = [r for r in known.get(extra, []) if not r.fits]
        if extra not in known:
            yield f"{extra:<{width}}  unknown    for {purpose}"
        elif wrong:
            reason = "; ".join(map(str, wrong))
            yield f"{extra:<{width}}  missing    for {purpose}: pip install 'stillhouse[{extra}]' ({reason})"
        else:
            yield f"{extra:<{width}}  installed  for {purpose} ({', '.join(map(str, known[extra]))})"


def devices() -> Iterator[str]:
    """The processors that torch sees, and which of them a run takes."""
    try:
        import torch
    except Exception as error:  # whatever the linker or a half-installed package raises
        yield f"PROBLEM: torch cannot be imported: {type(error).__name__}: {error}"
        return
    yield f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            yield f"cuda:{number}: {gpu.name}, {_size(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}"
        yield f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    else:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield f"cuda: none (this torch is built {built})"
    mps = torch.backends.mps.is_available()
    if mps:
        yield "mps: available; not tested with Stillhouse"
    chosen = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    yield f"runs take: {chosen}" + ("" if chosen == "cpu" else "; --cpu keeps them on the CPU")


def folders(data_root: str | None = None) -> Iterator[str]:
    """Where data sets are looked for, and the cache with its size."""
    root = data_root or os.environ.get("STILLHOUSE_DATA")
    if not root:
        yield "data root: none (--data-root, STILLHOUSE_DATA): data sets are looked for, and downloaded, in the cache"
    else:
        there = Path(root).expanduser().is_dir()
        yield f"data root: {_short(Path(root))}" + ("" if there else "  PROBLEM: there is no such folder")
    cache = cache_folder()
    if not cache.is_dir():
        yield f"cache: {_short(cache)}, not there yet"
        return
    parts = {part.name: _bytes(part) for part in sorted(cache.iterdir())}
    sizes = ", ".join(f"{name} {_size(size)}" for name, size in sorted(parts.items(), key=lambda p: -p[1])[:4])
    yield f"cache: {_short(cache)}, {_size(sum(parts.values()))}" + (f" ({sizes})" if parts else "")
    if not os.access(cache, os.W_OK | os.X_OK):
        yield "PROBLEM: the cache cannot be written; set STILLHOUSE_CACHE to a folder that can"


def _bytes(path: Path) -> int:
    """Of a file, or of all files below a folder; links are not followed."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size
    return sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(path) for name in names)


def _size(count: int) -> str:
    """Bytes in a unit that fits.

    >>> _size(512), _size(3 * 2**20)
    ('512 B', '3.0 MiB')
    """
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _short(path: Path) -> str:
    """A path with the home folder as `~`."""
    path = path.expanduser().absolute()
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
