"""The files that a repository's visitors look for: they parse, agree with the package, and name commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import stillhouse
from stillhouse import cli

ROOT = Path(__file__).resolve().parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_has_the_packages_version_and_licence() -> None:
    citation, project = yaml.safe_load(read("CITATION.cff")), read("pyproject.toml")
    assert citation["version"] == stillhouse.__version__ and f'license = "{citation["license"]}"' in project
    assert citation["authors"] == [{"name": "The Stillhouse developers"}]


def test_ci_tests_every_python_that_the_package_allows() -> None:
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    pythons = jobs["test"]["strategy"]["matrix"]["python"]
    assert re.search(r'requires-python = ">=([\d.]+)"', read("pyproject.toml")).group(1) == pythons[0]
    assert pythons == ["3.10", "3.11", "3.12", "3.13"] and "secrets." not in read(".github/workflows/ci.yml")
    lint = {step.get("run") for step in jobs["lint"]["steps"]}
    commands = re.search(r"^lint:.*\n\t(.*)$", read("Makefile"), re.MULTILINE).group(1).replace("$(BIN)/", "python -m ")
    assert set(commands.split(" && ")) <= lint, "CI lints otherwise than `make lint`"


def test_pre_commit_runs_ruff_and_mypy() -> None:
    hooks = [hook for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    assert [hook["entry"].split()[2] for hook in hooks] == ["ruff", "ruff", "mypy"]


def test_issue_forms_ask_for_what_the_command_prints() -> None:
    forms = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")]
    fields = [field for form in forms for field in form.get("body", [])]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert "stillhouse doctor" in read(".github/ISSUE_TEMPLATE/bug.yml")


def test_the_pages_at_the_root_name_commands_that_exist() -> None:
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    for page in ("CONTRIBUTING.md", "CHANGELOG.md", ".github/pull_request_template.md"):
        assert set(re.findall(r"`stillhouse ([a-z]+)", read(page))) <= commands
        targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
        assert set(re.findall(r"`make ([a-z]+)", read(page))) <= targets


def test_no_run_was_committed_into_the_checkout() -> None:
    found = {p.parent.relative_to(ROOT) for p in ROOT.glob("*/environment.json")}
    found |= {p.parent.relative_to(ROOT) for p in ROOT.glob("*/recipe.yaml")}
    assert not found - {Path("runs")}, "a test wrote into the checkout; give it tmp_path"
