"""What a user gets wrong on the command line and in a recipe is answered by a sentence that names it, before anything
long begins, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

STUDENT = """
data: {name: digits, size: 100, test_size: 100}
teacher: {model: stillhouse:mlp, options: {widths: [24]}, train: {epochs: 1, batch_size: 50}}
student: {model: stillhouse:mlp, options: {widths: [8]}}
objectives: [ce, kd]
train: {epochs: 2, batch_size: 50}
variants: {alone: {objectives: [ce]}}
"""
SET = """
method: dm
data: {name: digits, augment: plain, size: 300, test_size: 100}
network: {model: stillhouse:convnet2, options: {width: 4}}
augment: {groups: crop_scale_rotate}
iterations: 2
batch_real: 8
evaluate: {networks: 1, epochs: 2}
variants: {ipc10: {ipc: 10}}
"""


@pytest.fixture
def command(command):
    """The command, in a folder with `student.yaml` and `set.yaml`."""
    Path("student.yaml").write_text(STUDENT)
    Path("set.yaml").write_text(SET)
    Path("afile").write_text("mine")
    return command


def refused(command, *arguments: str) -> str:
    """The one sentence that answers a command."""
    code, _, err = command(*arguments)
    assert code == 2 and err.startswith("stillhouse: ") and "Traceback" not in err, err
    assert err.count("\n") == 1, f"one sentence: {err}"
    return err


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("ipc=0", "'ipc' must be at least 1; given: 0."),
        ("ipc=", "'ipc' must be a whole number; given: null."),
        ("zca=treu", "'zca' must be true or false; given: 'treu'."),
        ("init=reel", "'init' must be 'noise', 'real', 'representative' or 'mix'; given: 'reel'. Did you mean 'real'?"),
        ("augment=crop_flip", "'augment' must be a mapping with keys such as groups, always; given: 'crop_flip'."),
        (
            "augment.groups=crop_colour",
            "augment.groups: There is no augmentation group 'colour'; did you mean 'color'?\n",
        ),
        ("data.augment=none", "'data.augment' must be 'standard' or 'plain' or a list; given: 'none'."),
        ("data.augment=[3]", "'data.augment.0' must be text or a mapping of keys to values; given: 3."),
        ("iteratons=10", "unknown key 'iteratons'; did you mean 'iterations'?"),
        ("objectives=[kd]", "unknown key 'objectives'; valid keys there: method, name,"),
        ("evaluate.cross=stillhouse:mlp", "'evaluate.cross' must be a list; given: 'stillhouse:mlp'."),
        (
            "evaluate.cross=[stillhouse:mlp2]",
            "evaluate.cross.0: There is no net 'stillhouse:mlp2'; did you mean 'stillhouse:mlp'?",
        ),
        (
            "evaluate.network=timm:resnt18",
            "evaluate.network: There is no timm model 'timm:resnt18'; did you mean 'timm:resnet18'",
        ),
        ("network.model=convnet3", "network: There is no model 'convnet3'"),
        (
            "network.options.widht=8",
            "network: There is no option 'options.widht' of 'stillhouse:convnet2'; did you mean 'options.width'",
        ),
        ("evaluate.protocol=soft", "evaluate.protocol is soft, but dm gives its images hard labels; take hard."),
        ("method=dmm", "set.yaml: method: There is no method 'dmm'; did you mean 'dm'"),
    ],
)
def test_a_wrong_key_or_value_is_told_before_a_folder_is_made(command, key: str, says: str):
    assert says in refused(command, "run", "set.yaml", "--out", "x", "--set", key)
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("augment.groups=crop_flip", "Images of 'digits' change their class when mirrored; set augment.groups=crop.\n"),
        ("augment={}", "set augment.groups=color_crop_cutout_scale_rotate.\n"),
        ("evaluate.augment={always: flip, groups: ''}", "set evaluate.augment.always=''.\n"),
        ("mirror=true", "set mirror=false.\n"),
        ("evaluate.cross=[stillhouse:convnet4]", "depth 4 is too deep for images of 8 x 8"),
        ("ipc=500", "500 images (ipc) of each class are wanted, but '0' has 30"),
    ],
)
def test_what_does_not_suit_the_images_is_told_before_any_is_learned(command, key: str, says: str):
    assert says in refused(command, "run", "set.yaml", "--cpu", "--set", key)


def test_options_whose_names_begin_like_a_type_keep_their_path(command):
    given = "objectives=[ce, {name: fitnet, student_layer: 3, teacher_layer: fc}]"
    assert "'objectives.1.student_layer' must be text; given: 3." in refused(
        command, "run", "student.yaml", "--set", given
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dmm", "did you mean 'dm', which comes with the package?"),
        ("elsewhere/dm.yaml", "did you mean 'dm', which comes with the package?"),
        ("recipes/datasets/mtt.yml", "did you mean 'recipes/datasets/mtt.yaml'?"),
        ("sett.yaml", "did you mean 'set.yaml'?"),
        ("recipes/datasets", "is a folder; name a recipe in it, such as 'recipes/datasets/mtt.yaml'."),
    ],
)
def test_what_is_no_recipe_leads_to_one(command, name: str, says: str):
    Path("recipes/datasets").mkdir(parents=True)
    Path("recipes/datasets/mtt.yaml").write_text(SET)
    assert says in refused(command, "run", name)


def test_a_key_given_twice_is_refused_and_a_merged_one_is_not(command):
    Path("twice.yaml").write_text("data: digits\ndata: cifar10\n")
    assert "line 2, column 1: the key 'data' is given twice." in refused(command, "run", "twice.yaml")
    Path("merged.yaml").write_text(
        SET.partition("variants:")[0] + "variants:\n  small: &small {ipc: 2}\n  again: {<<: *small, ipc: 3}\n"
    )
    assert "ipc: 3" in command("run", "merged.yaml", "--variant", "again", "--dry-run")[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "student.yaml", "--out", "afile"], "Cannot write in 'afile': it is a file"),
        (["run", "student.yaml", "--out", "afile/below"], "Cannot write in 'afile/below': not a directory"),
        (["bench", "student.yaml", "--out", "b", "--evidence", "afile/x.json"], "Cannot write in 'afile'"),
        (["cache", "student.yaml", "--out", "afile/store"], "Cannot write in 'afile'"),
        (["demo", "--out", "afile"], "Cannot write in 'afile': it is a file"),
        (["run", "student.yaml", "--data-root", "nowhere"], "--data-root: there is no folder 'nowhere'."),
        (["run", "student.yaml", "--data-root", "nowhere", "--dry-run"], "--data-root: there is no folder 'nowhere'."),
    ],
)
def test_a_place_that_cannot_be_used_is_told_first(command, arguments: list[str], says: str):
    assert says in refused(command, *arguments)
    assert Path("afile").read_text() == "mine"


def test_a_cache_that_cannot_be_written_is_told_before_the_run(command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", "afile")
    assert "Cannot write in the cache folder (STILLHOUSE_CACHE), 'afile': it is a file" in refused(
        command, "run", "set.yaml", "--out", "x"
    )


@pytest.mark.parametrize("seeds", ["a,b", "", "0-2", "0,0"])
def test_seeds_are_numbers_each_once(command, seeds: str):
    assert "--seeds" in refused(command, "bench", "student.yaml", "--seeds", seeds, "--out", "b")
    assert not Path("b").exists()


def test_a_comparison_checks_all_its_recipes_before_it_runs_the_first(command):
    says = refused(
        command,
        "bench",
        "student.yaml",
        "set.yaml",
        "--variants",
        "base",
        "--set",
        "train.epochs=1",
        "--seeds",
        "0",
        "--out",
        "b",
    )
    assert "set.yaml: unknown key 'train'" in says and not list(Path("b").iterdir())


def test_a_comparison_does_not_take_a_run_of_another_recipe_for_its_own(command):
    arguments = ["bench", "student.yaml", "--variants", "alone", "--seeds", "0", "--cpu", "--out", "b"]
    assert command(*arguments)[0] == 0
    assert command(*arguments)[0] == 0, "the same again is kept"
    says = refused(command, *arguments, "--set", "train.epochs=1")
    assert "b/alone-s0 holds a finished run of another recipe ('train.epochs: 2' there, 'train.epochs: 1' now)" in says
    assert "'data.size' there, 'data.size: null' now" in refused(command, *arguments, "--set", "data.size=null")
    assert "The row 'alone'" in says and "--overwrite" in says
    held = Path("b/alone-s0/recipe.yaml")
    held.write_text("".join(line for line in held.read_text().splitlines(True) if "deterministic" not in line))
    assert command(*arguments)[0] == 0, "a run from before an option came is the same run"


def test_a_figure_that_no_row_has_leaves_the_results_as_they_were(command):
    arguments = ["bench", "student.yaml", "--variants", "alone", "--seeds", "0", "--cpu", "--out", "b"]
    assert command(*arguments)[0] == 0
    before = Path("b/results.json").read_text()
    assert "'acuracy'" in refused(command, *arguments, "--primary", "acuracy")
    assert Path("b/results.json").read_text() == before and json.loads(before)["rows"]


def test_a_folder_that_is_not_a_runs_is_never_emptied(command):
    Path("project").mkdir()
    Path("project/recipe.yaml").write_text(STUDENT)
    Path("project/thesis.txt").write_text("years of work")
    for more in ([], ["--overwrite"]):
        assert "is not a run's folder" in refused(command, "run", "project/recipe.yaml", "--out", "project", *more)
        assert "is not a demo's folder" in refused(command, "demo", "--out", "project", "--overwrite")
    assert (
        Path("project/thesis.txt").read_text() == "years of work" and Path("project/recipe.yaml").read_text() == STUDENT
    )


def test_a_warning_of_ours_is_a_sentence(command, recwarn: pytest.WarningsRecorder):
    Path("packed.yaml").write_text(
        "method: pca\ndata: {name: digits, augment: plain, size: 20, test_size: 20}\nnetwork: "
        "{model: stillhouse:convnet2, options: {width: 4}}\n"
        "ipc: 3\nscorer: {train: {epochs: 1, batch_size: 10}}\nevaluate: {networks: 1, epochs: 1, random: false}\n"
    )
    code, _, err = command("run", "packed.yaml", "--cpu")
    assert (
        code == 0
        and "stillhouse: pca: 12 images of each class are wanted" in err
        and "UserWarning" not in err
        and ".py" not in err
    )


def test_rows_of_different_kinds_are_compared_with_a_word_of_caution(command):
    arguments = ["bench", "student.yaml", "set.yaml", "--variants", "base", "--seeds", "0", "--cpu", "--out", "b"]
    code, _, err = command(*arguments)
    assert code == 0 and "products of different kinds (student: student; synthetic_set: set), so that figures" in err


def test_the_report_of_a_run_that_has_not_finished_says_so(command):
    assert command("run", "student.yaml", "--cpu", "--out", "x")[0] == 0
    assert "has not finished" not in command("report", "x")[1]
    Path("x/evaluation.json").unlink()
    code, out, _ = command("report", "x")
    assert code == 0 and "has not finished" in out and Path("x/report.html").is_file()
