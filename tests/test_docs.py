"""The documentation does what it says: its code blocks run in order, its links resolve, its generated pages are what
the code says.

A block that begins with `# file: NAME` is saved under that name; other `python` blocks run, as do the lines of `bash`
blocks that begin with `stillhouse` or `pytest`.
Blocks marked `no-run` are only read, and so are those marked with a library that is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import stillhouse
from stillhouse import catalog, cli
from stillhouse.config.specs import MethodConfig

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
EVERY = [*WRITTEN, *sorted((ROOT / "docs" / "methods").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    marks: str
    text: str

    @property
    def file(self) -> str | None:
        """The name that it is to be saved under."""
        found = re.match(r"# file: (\S+)\n", self.text)
        return found.group(1) if found else None


def blocks(page: Path) -> Iterator[Block]:
    for language, marks, text in FENCE.findall(page.read_text(encoding="utf-8")):
        yield Block(language, marks, text)


def command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `stillhouse` line of a page, in this process; it must end well."""
    words = line.partition("#")[0].split()
    monkeypatch.setattr(sys, "argv", words)
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, f"`{line}` ended with exit code {stop.code}"


def follow(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Do what a page says, top to bottom, in a folder; the names that its Python blocks leave."""
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text)
        elif "no-run" in block.marks or any(importlib.util.find_spec(needed) is None for needed in block.marks.split()):
            continue
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), names)
        elif block.language == "bash":
            for line in block.text.splitlines():
                if line.startswith("stillhouse "):
                    command(line, monkeypatch)
                elif line.startswith("pytest "):
                    done = subprocess.run(
                        [sys.executable, "-m", *line.split()], cwd=folder, capture_output=True, text=True, check=False
                    )
                    assert not done.returncode, done.stdout + done.stderr
    return names


def accuracy(run: Path) -> float:
    """Of a finished run, on test data."""
    return float(json.loads((run / "evaluation.json").read_text())["accuracy"])


def test_the_readme_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    names = follow(ROOT / "README.md", tmp_path, monkeypatch)
    right = (names["student"].cpu()(names["x"]).argmax(1) == names["y"]).float().mean()
    assert right > 0.8, "the student of the README learned little"
    assert (tmp_path / "runs" / "digits-s0" / "report.html").is_file() and (
        tmp_path / "runs" / "digits-alone-s0" / "product"
    ).is_dir()
    learned, random = (accuracy(tmp_path / "runs" / name) for name in ("small-s0", "small-random-s0"))
    assert learned > random + 0.1 and (tmp_path / "runs" / "small-s0" / "product" / "sheet.png").is_file()


def test_the_quick_start_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    follow(ROOT / "docs" / "quick-start.md", tmp_path, monkeypatch)
    shown = capsys.readouterr().out
    assert "1. teacher" in shown and "2. student" in shown and "Options of nkd" in shown
    for name in re.findall(r"^\| `([\w.]+)/?` \|", (ROOT / "docs" / "quick-start.md").read_text(), re.MULTILINE):
        assert (tmp_path / "runs" / "first-s0" / name).exists(), f"the run left no {name}"
    assert (tmp_path / "student.safetensors").is_file() and (
        tmp_path / "runs" / "bench-first" / "report.html"
    ).is_file()


def photos(folder: Path) -> None:
    """A few pictures in folders, as a reader would have them."""
    from PIL import Image

    for name, colour in (("apples", 0), ("pears", 1)):
        for i in range(24):
            pixels = (torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(i)) * 128).to(torch.uint8)
            pixels[..., colour] += 96
            path = folder / "photos" / "train" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(path)


def test_the_page_on_your_own_model_and_data_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    photos(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = follow(ROOT / "docs" / "your-own.md", tmp_path, monkeypatch)
    shown = capsys.readouterr().out
    assert (
        "mobilenetv3_small_050" in shown
        and (tmp_path / "runs" / "try" / "product").is_dir()
        and (tmp_path / "runs" / "by-hand" / "metrics.csv").is_file()
    )
    assert not names["student"].training


def test_the_page_on_synthetic_sets_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    names = follow(ROOT / "docs" / "synthetic-sets.md", tmp_path, monkeypatch)
    shown = capsys.readouterr().out
    assert names["product"].images.shape == (20, 1, 8, 8)
    assert "lrs" in shown and "accuracy_mlp" in shown and "Gain over random" in re.sub(r"\s+", " ", shown)
    assert "Wrote 20 images of 10 classes: small\n" in shown and (tmp_path / "small.parquet").is_file()
    assert (tmp_path / "runs" / "student-s0" / "product").is_dir() and (
        tmp_path / "runs" / "from-files-s0" / "product"
    ).is_dir()


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the page on adding a method, nothing run."""
    for block in blocks(ROOT / "docs" / "adding-a-method.md"):
        if block.file:
            (tmp_path / block.file).write_text(block.text)
    return tmp_path


def test_the_page_on_adding_a_method_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    follow(ROOT / "docs" / "adding-a-method.md", tmp_path, monkeypatch)
    shown = capsys.readouterr().out
    assert "sure_kd.sureness" in (tmp_path / "runs" / "sure-s0" / "metrics.csv").read_text().splitlines()[0]
    assert "Gain over alone" in re.sub(r"\s+", " ", shown) and "2. assistant: distil the teacher" in shown
    results = json.loads((tmp_path / "runs" / "bench-mean_image" / "results.json").read_text())
    assert results["baseline"] == "random", "ten random images are what learned ones are compared with"
    learned, random = (row["metrics"]["accuracy"][0] for row in results["rows"])
    assert learned > random + 0.05 and "Gain over random" in re.sub(r"\s+", " ", shown)
    assert stillhouse.load(tmp_path / "runs" / "assistant-s0")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert not (tmp_path / "runs" / "assistant-s0" / "stages").exists(), (
        "the assistant's stage is shared, and so in the cache"
    )


def test_the_code_of_the_page_on_adding_a_method_passes_our_lint(added: Path):
    pytest.importorskip("ruff")
    config = ROOT / "pyproject.toml"
    project = added / "pyproject.toml"
    project.unlink()  # that of the plug-in, which has no rules of its own
    options = ["--config", str(config), "--config", f"src = ['{ROOT / 'src'}']", "--no-cache", str(added)]
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, *options], capture_output=True, text=True, check=False
        )
        assert not done.returncode, done.stdout + done.stderr


def test_the_code_of_the_page_on_adding_a_method_is_typed(added: Path):
    pytest.importorskip("mypy")
    (added / "pyproject.toml").unlink()
    config, cache = ROOT / "pyproject.toml", ROOT / ".mypy_cache"
    words = ["--config-file", str(config), "--cache-dir", str(cache), *map(str, sorted(added.glob("*.py")))]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words],
        cwd=added,
        env={**os.environ, "MYPYPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stdout + done.stderr


def test_an_installed_plug_in_is_found_by_its_entry_points(added: Path):
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 to read pyproject.toml")
    project = tomllib.loads((added / "pyproject.toml").read_text())["project"]
    info = added / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) + "\n" for group, points in groups)
    )
    recipe = (
        (added / "assistant.yaml")
        .read_text()
        .replace("file:assistant.py", "assistant")
        .replace("kd]", "{name: sure_kd, temperature: 2}]")
    )
    assert "method: assistant\n" in recipe and "sure_kd" in recipe
    (added / "by_name.yaml").write_text(recipe)

    def shown(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "stillhouse", *arguments],
            cwd=added,
            env={**os.environ, "PYTHONPATH": str(added)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = shown("methods")
    assert re.search(r"^  sure_kd +The student listens more", listed, re.MULTILINE) and re.search(
        r"^  assistant +Distil a middle-sized", listed, re.MULTILINE
    )
    planned = shown("run", "by_name.yaml", "--dry-run")
    assert "2. assistant" in planned and "temperature: 2.0" in planned


def test_the_page_on_integrations_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    names = follow(ROOT / "docs" / "integrations.md", tmp_path, monkeypatch)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in names["teacher"].modules())
    assert "trainer" not in names or (tmp_path / "student" / "model.safetensors").is_file()


def test_the_page_on_the_store_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    follow(ROOT / "docs" / "store.md", tmp_path, monkeypatch)
    shown = capsys.readouterr().out
    assert "300 samples, 6 views: logits; fp16" in shown and "torch.Size([3, 10])" in shown
    assert all(accuracy(tmp_path / "runs" / name) > 0.7 for name in ("stored-s0", "both")), (
        "the page's students learned little"
    )


def test_the_page_on_recipes_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    follow(ROOT / "docs" / "recipes.md", tmp_path, monkeypatch)
    assert "from_own" in (tmp_path / "runs" / "warmer-s0" / "metrics.csv").read_text().splitlines()[0]


def anchors(page: Path) -> set[str]:
    """What a link may name after `#`: headings as a page of Markdown shows them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("page", EVERY, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_relative_link_resolves(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(there), (
            f"{page.name} links to {target}, but {there.name} has no such heading"
        )


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """docs/build.py."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return importlib.import_module("build")
    finally:
        sys.path.remove(str(ROOT / "docs"))


@pytest.fixture(scope="module")
def pages(build: ModuleType, once: Callable[[str, Callable[[], Any]], Any]) -> dict[Path, str]:
    """All generated pages."""
    made = once("pages", lambda: {str(path): text for path, text in build.pages().items()})
    return {Path(path): text for path, text in made.items()}


def test_the_recipe_reference_is_what_the_types_say(pages: dict[Path, str]):
    page = ROOT / "docs" / "recipes.md"
    assert page.read_text(encoding="utf-8") == pages[page], "docs/recipes.md is stale; run `make docs`"


def test_every_method_has_a_page_that_lists_its_options_and_says_what_is_missing(
    build: ModuleType, pages: dict[Path, str]
):
    for card in build.cards():
        text = pages[ROOT / "docs" / "methods" / f"{card.slug}.md"]
        assert f"(methods/{card.slug}.md)" in pages[ROOT / "docs" / "catalogue.md"]
        assert ("Not measured yet." in text) == (not build.measured(card))
        keys = (
            (k for n in card.provides for k in catalog.options(catalog.objective(n)).model_fields)
            if card.kind == "objective"
            else catalog.method(card.slug).Config.model_fields
        )
        for key in keys:
            assert f"| `{key}`" in text or key in MethodConfig.model_fields, (
                f"the page of {card.slug} does not list {key}"
            )


def test_every_claim_is_on_the_page_of_claims_and_on_its_methods_page(build: ModuleType, pages: dict[Path, str]):
    page = pages[ROOT / "docs" / "claims.md"]
    for slug, claims in build.claims_of().items():
        own = pages[ROOT / "docs" / "methods" / f"{slug}.md"]
        assert f"## {slug}\n" in page and "Where to start: " in own
        for name, verdict in claims:
            rows = [
                line for line in page.splitlines() if line.startswith(f"| {build.prose(verdict.says, in_table=True)}")
            ]
            assert any(
                build.prose(verdict.measured, in_table=True) in row and verdict.verdict in row for row in rows
            ), (name, verdict.says)
            assert build.prose(verdict.says) in own


def test_a_stale_page_is_told_and_mended(build: ModuleType, tmp_path: Path):
    page, gone = tmp_path / "docs" / "methods" / "kd.md", tmp_path / "docs" / "methods" / "gone.md"
    page.parent.mkdir(parents=True)
    page.write_text("old")
    gone.write_text("a method that is gone")
    wanted = {page: "new"}
    assert build.stale(wanted, page.parent) == [gone, page]
    assert build.write(wanted, page.parent) == [gone, page] and page.read_text() == "new" and not gone.exists()
    assert build.stale(wanted, page.parent) == []


def test_the_page_on_checkpoints_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    names = follow(ROOT / "docs" / "checkpoint.md", tmp_path, monkeypatch)
    assert accuracy(tmp_path / "runs" / "renamed-s0") == accuracy(tmp_path / "runs" / "small-s0"), (
        "the renamed weights are others"
    )
    assert names["teacher"](torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert accuracy(tmp_path / "runs" / "three-s0") > 0.8


def test_the_page_on_text_classifiers_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("transformers")
    names = follow(ROOT / "docs" / "text-classifier.md", tmp_path, monkeypatch)
    assert names["student"].classes == ["bad", "good"] and accuracy(tmp_path / "runs" / "reviews-s0") > 0.8
    assert "good" in capsys.readouterr().out and (tmp_path / "runs" / "named" / "product").is_dir()


def test_the_page_on_detectors_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("pycocotools")
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    follow(ROOT / "docs" / "detection.md", tmp_path, monkeypatch)
    found = json.loads((tmp_path / "found" / "predictions.jsonl").read_text())
    assert set(found["counts"]) <= {"bar", "square", "nothing"} and (tmp_path / "found" / "0.png").exists()


def test_the_page_on_shipping_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    names = follow(ROOT / "docs" / "ship.md", tmp_path, monkeypatch)
    x = torch.randn(3, 1, 8, 8)
    for student in (names["student"], names["program"]):
        torch.testing.assert_close(student(x), names["network"](x), rtol=1e-4, atol=1e-5)


def test_the_page_on_gpus_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    follow(ROOT / "docs" / "gpus.md", tmp_path, monkeypatch)
    assert "runs take: " in capsys.readouterr().out
