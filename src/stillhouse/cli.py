"""The command: parses, calls, prints. Exit codes: 0 done, 2 the user's mistake, 1 ours. `--help` and `methods` import
no torch."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from stillhouse.runs.method import Stage

app = typer.Typer(
    name="stillhouse",
    help="Knowledge distillation under one roof: train a small model on the outputs of a big one.\n\nStart with: "
    "stillhouse demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _located(recipe: Path) -> Path:
    """A recipe's file, also of one that comes with the package and is given by its name."""
    from stillhouse.config.shipped import located

    return located(recipe)


Recipe = Annotated[
    Path,
    typer.Argument(
        help="A recipe file (YAML), or the name of one that `stillhouse recipe` lists.",
        metavar="RECIPE",
        callback=_located,
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key: train.epochs=3. May be given several times.", metavar="KEY=VALUE"),
]
DataRoot = Annotated[
    str | None, typer.Option(help="Folder that holds the data sets; default: STILLHOUSE_DATA.", metavar="FOLDER")
]
Cpu = Annotated[bool, typer.Option("--cpu", help="Use no GPU; the same as --device cpu.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="Work on this device (cpu, cuda, cuda:1, mps), or say that it is not there; default: the first GPU that "
        "torch sees, else the CPU.",
        metavar="NAME",
    ),
]


def _version(value: bool) -> None:
    if value:
        from stillhouse import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: stillhouse run recipes/classification/digits.yaml --variant kd --set train.epochs=50")
def run(
    recipe: Recipe,
    set_: Sets = None,
    variant: Annotated[
        str | None, typer.Option(help="One of the recipe's variants, such as paper.", metavar="NAME")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; default: runs/NAME-sSEED.", metavar="FOLDER")
    ] = None,
    data_root: DataRoot = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and the plan; train nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over in a folder that holds a run.")] = False,
    cpu: Cpu = False,
    device: Device = None,
) -> None:
    """Run a recipe: train, save the product, write the report. An interrupted run resumes."""
    from stillhouse.runs import recipe as recipes

    config = recipes.load(recipe, variant, set_ or [])
    if dry_run:
        _check_data_root(data_root)
        from stillhouse.runs.execution import plan

        typer.echo(recipes.dump(config))
        _print_plan(plan(config, data_root=data_root, cpu=cpu, device=device))
        return
    from stillhouse.evaluation.quantities import quantity
    from stillhouse.runs.execution import execute
    from stillhouse.training.display import Bars

    folder = out or Path("runs") / f"{config.name}-s{config.seed}"
    _ready(folder, data_root)
    figures = execute(config, folder, data_root=data_root, live=Bars(), overwrite=overwrite, cpu=cpu, device=device)
    if os.environ.get("RANK", "0") == "0":
        width = max(map(len, figures), default=0)
        for name, value in figures.items():
            typer.echo(f"{name:<{width}}  {quantity(name, value).text(value)}")
        typer.echo(f"\nReport: {folder / 'report.html'}\nUse it: stillhouse.load({str(folder)!r})")


def _print_plan(stages: list[Stage]) -> None:
    typer.echo("Plan:")
    for number, stage in enumerate(stages, 1):
        typer.echo(
            f"  {number}. {stage.name}: {stage.does}" + (f", {stage.steps:,} steps" if stage.steps is not None else "")
        )
        for role, text in stage.models.items():
            typer.echo(f"     {role}: {text}")
        for name, path in stage.taps.items():
            typer.echo(f"     tap {name}: {path}")


@app.command(epilog="Example: stillhouse recipe kd > mine.yaml")
def recipe(
    name: Annotated[str | None, typer.Argument(help="A recipe; without it, all are listed.", metavar="NAME")] = None,
) -> None:
    """Print a recipe that comes with the package, or list them."""
    import textwrap

    from stillhouse.config import shipped

    if name is not None:
        typer.echo(shipped.text(name), nl=False)
        return
    family = ""
    for label, path in shipped.shipped().items():
        if path.parent.name != family:
            family = path.parent.name
            typer.echo(f"{family}:")
        typer.echo(f"  {label:<28} {textwrap.shorten(shipped.about(path), 90, placeholder=' …')}")


@app.command(
    epilog="Example: stillhouse init --data imagefolder:photos --teacher timm:resnet50 --student "
    "timm:mobilenetv3_small_100"
)
def init(
    data: Annotated[str, typer.Option(help="A data set by name, such as imagefolder:PATH.", metavar="NAME")],
    teacher: Annotated[str, typer.Option(help="The big network by name, such as timm:resnet50.", metavar="NAME")],
    student: Annotated[str, typer.Option(help="The small network by name.", metavar="NAME")],
    out: Annotated[Path, typer.Option(help="The recipe to write.", metavar="FILE")] = Path("recipe.yaml"),
    pretrained: Annotated[
        bool, typer.Option(help="Start timm's and torchvision's networks from their published weights.")
    ] = True,
    data_root: DataRoot = None,
) -> None:
    """Write a recipe to start from, with a schedule that suits the data, a baseline and a claim. Asks nothing."""
    from stillhouse.errors import UserError
    from stillhouse.runs.draft import draft

    if out.exists():
        raise UserError(f"'{out}' is there already; choose another file with --out.")
    _check_data_root(data_root)
    text = draft(data, teacher, student, pretrained=pretrained, data_root=data_root)
    out.write_text(text.replace("FILE", str(out)), encoding="utf-8")
    typer.echo(f"Wrote {out}. Next: stillhouse run {out} --dry-run, then stillhouse bench {out} --seeds 0,1,2")


@app.command(epilog="Example: stillhouse methods nkd_uskd")
def methods(
    name: Annotated[
        str | None, typer.Argument(help="A method or an objective; without it, all are listed.", metavar="NAME")
    ] = None,
) -> None:
    """List methods and objectives, or show one."""
    from stillhouse import catalog
    from stillhouse.runs import listing

    card = None if name is None else catalog.card(name)
    for line in listing.all_methods() if card is None else listing.one_method(card):
        typer.echo(line)
    measured = None if card is None else listing.evidence(card)
    if measured is not None:
        from rich.console import Console

        from stillhouse.reporting.comparison import comparison_table

        typer.echo("\nMeasured:")
        Console().print(comparison_table(measured))


@app.command(epilog="Example: stillhouse bench recipes/classification/digits.yaml --variants alone,kd --seeds 0,1,2")
def bench(
    recipe: Annotated[
        list[Path],
        typer.Argument(
            help="Recipes (YAML, or names); each of them and each of its variants is a row.",
            metavar="RECIPE",
            callback=lambda given: [_located(r) for r in given],
        ),
    ],
    variants: Annotated[
        str | None,
        typer.Option(
            help="Variants, comma separated; base is the recipe itself. Default: base and all but paper… and smoke.",
            metavar="NAMES",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, comma separated.", metavar="NUMBERS")] = "0,1,2",
    baseline: Annotated[
        str | None,
        typer.Option(
            help="The row that the others are compared with; default: alone, ce, random, or the first.", metavar="ROW"
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="The row whose training step is the unit of cost, where recipes measure it (evaluate: [step]); "
            "default: kd, or the baseline.",
            metavar="ROW",
        ),
    ] = None,
    primary: Annotated[
        str | None,
        typer.Option(
            help="The figure that rows are compared by, such as nll; default: accuracy, or the first that there is.",
            metavar="FIGURE",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; default: runs/bench-NAME.", metavar="FOLDER")
    ] = None,
    evidence: Annotated[Path | None, typer.Option(help="Also write the results as JSON here.", metavar="FILE")] = None,
    set_: Sets = None,
    data_root: DataRoot = None,
    engine: Annotated[str, typer.Option(help="local, or ray.", metavar="NAME")] = "local",
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs at the same time.", metavar="N")] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over the rows whose folders hold runs of other recipes.")
    ] = False,
    cpu: Cpu = False,
    device: Device = None,
) -> None:
    """Compare recipes and variants over seeds, and judge the recipes' claims. Finished runs of the same recipe and code
    are reused."""
    import json

    from rich.console import Console

    from stillhouse.files import atomic_write
    from stillhouse.reporting.comparison import comparison_table, write_comparison_report
    from stillhouse.reporting.verdicts import Verdict, verdict_lines
    from stillhouse.runs.bench import bench as run_bench
    from stillhouse.runs.bench import entries
    from stillhouse.training.display import Bars

    numbers = _seeds(seeds)
    rows = entries(recipe, None if variants is None else [v.strip() for v in variants.split(",")])
    folder = out or Path("runs") / f"bench-{recipe[0].stem}"
    _ready(folder, data_root, *([evidence.parent] if evidence else []))
    results = run_bench(
        rows,
        numbers,
        folder,
        baseline=baseline,
        reference=reference,
        primary=primary,
        sets=set_ or [],
        data_root=data_root,
        cpu=cpu,
        device=device,
        overwrite=overwrite,
        engine=engine,
        jobs=jobs,
        slug=evidence.stem if evidence else recipe[0].stem,
        live=Bars(),
        after=lambda job, n, total: typer.echo(f"[{n}/{total}] {job.folder.name} done", err=True),
    )
    results["command"] = " ".join(["stillhouse", *_without_places(sys.argv[1:])])
    table = comparison_table(results)  # a wrong figure is reported before anything is written
    for path in filter(None, (folder / "results.json", evidence)):
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
    write_comparison_report(results, folder / "report.html")
    Console().print(table)
    for line in verdict_lines([Verdict.from_record(record) for record in results["claims"]]):
        typer.echo(line)
    typer.echo(f"Report: {folder / 'report.html'}")


@app.command(epilog="Example: stillhouse evidence acam_kd pld")
def evidence(
    names: Annotated[list[str] | None, typer.Argument(help="Recipes by name; default: all.", metavar="NAME")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="List the evidence that is out of date; exit 1 where there is any.")
    ] = False,
    missing: Annotated[bool, typer.Option("--missing", help="List the methods without claims.")] = False,
    verdicts: Annotated[
        bool, typer.Option("--verdicts", help="Judge all claims again, from the recorded rows, and write the verdicts.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write the claims as an HTML page whose table can be sorted.", metavar="FILE")
    ] = None,
    recipes: Annotated[Path, typer.Option(help="Folder of the recipes.", metavar="FOLDER")] = Path("recipes"),
    evidence: Annotated[Path, typer.Option(help="Folder of the recorded comparisons.", metavar="FOLDER")] = Path(
        "evidence"
    ),
) -> None:
    """Show the recipes' claims with their verdicts, or what evidence is stale or missing. Runs nothing."""
    from stillhouse.errors import unknown
    from stillhouse.reporting.verdicts import counted, verdict_lines, write_claims_page
    from stillhouse.runs.evidence import Library

    library = Library.read(recipes, evidence)
    stale = list(library.stale()) if check else []
    for line in stale:
        typer.echo(line)
    if missing:
        for slug in library.missing():
            typer.echo(f"no claims: {slug}")
    if verdicts:
        for path in library.write_verdicts():
            typer.echo(f"Wrote {path}")
    claimed = library.claimed() if report is not None or not (check or missing or verdicts) else {}
    for name in names or ():
        if f"{name}.yaml" not in claimed:
            raise unknown("recipe with claims", name, [Path(n).stem for n in claimed])
    shown = {n: v for n, v in claimed.items() if not names or Path(n).stem in names}
    for recipe, found in shown.items() if not report else ():
        typer.echo(f"\n{Path(recipe).stem}: {counted(found)}")
        for line in verdict_lines(found):
            typer.echo(f"  {line}")
    if report is not None:
        every = [(", ".join(library.papers(n, v)), v) for n, found in shown.items() for v in found]
        typer.echo(f"Report: {write_claims_page(every, report)}")
    elif shown and not names:
        typer.echo(f"\nIn all: {counted(v for found in shown.values() for v in found)}.")
    if any(line.startswith("stale") for line in stale):
        raise typer.Exit(1)


def _without_places(arguments: list[str]) -> list[str]:
    """A command's arguments without the folders of one machine."""
    out, skip = [], False
    for i, argument in enumerate(arguments):
        if skip:
            skip = False
            continue
        name, given, value = argument.partition("=")
        absolute = Path(value if given else (arguments[i + 1] if i + 1 < len(arguments) else "")).is_absolute()
        if name in ("--out", "--data-root") or (name == "--evidence" and absolute):
            skip = not given
            continue
        out.append(argument)
    return out


def _seeds(text: str) -> list[int]:
    from stillhouse.errors import UserError

    try:
        seeds = [int(s) for s in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds takes whole numbers separated by commas, such as 0,1,2; given: '{text}'.") from None
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds names a seed twice, which would count one run as two; given: '{text}'.")
    return seeds


def _ready(folder: Path, data_root: str | None = None, *others: Path) -> None:
    """Raises `UserError`, before anything long begins, where the folder of a run, or the cache, cannot be written, or
    the data root is not there."""
    from stillhouse.errors import UserError
    from stillhouse.files import cache_folder

    _check_data_root(data_root)
    for what, path in (
        *(("", p) for p in (folder, *others)),
        ("the cache folder (STILLHOUSE_CACHE), ", cache_folder()),
    ):
        try:
            path.mkdir(parents=True, exist_ok=True)
            problem = "" if os.access(path, os.W_OK | os.X_OK) else "permission denied"
        except OSError as error:
            problem = "it is a file" if path.is_file() else str(error.strerror or error).lower()
        if problem:
            raise UserError(f"Cannot write in {what}'{path}': {problem}; choose another folder.")


def _check_data_root(data_root: str | None) -> None:
    from stillhouse.errors import UserError

    if data_root is not None and not Path(data_root).expanduser().is_dir():
        raise UserError(f"--data-root: there is no folder '{data_root}'.")


@app.command(
    epilog="Example: stillhouse cache recipes/classification/store_digits.yaml --out stores/digits --top 5 "
    "--precision fp16 --views 5"
)
def cache(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="The store's folder; an interrupted pass resumes.", metavar="FOLDER")],
    top: Annotated[
        int | None,
        typer.Option(help="Store the K most probable classes and the mass of the others; default: all.", metavar="K"),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16, bf16 or int8; default: fp32.", metavar="TYPE")
    ] = None,
    views: Annotated[int | None, typer.Option(help="Augmented views of each sample; default: 1.", metavar="N")] = None,
    embedding: Annotated[bool, typer.Option("--embedding", help="Store the embedding too.")] = False,
    tap: Annotated[
        list[str] | None, typer.Option(help="Store this tap too. May be given several times.", metavar="LAYER")
    ] = None,
    teacher: Annotated[str, typer.Option(help="Which of the recipe's teachers.", metavar="NAME")] = "teacher",
    set_: Sets = None,
    variant: Annotated[str | None, typer.Option(help="One of the recipe's variants.", metavar="NAME")] = None,
    data_root: DataRoot = None,
    engine: Annotated[
        str, typer.Option(help="local (under torchrun: every process takes its share), or ray.", metavar="NAME")
    ] = "local",
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            help="Workers, with --engine ray; requests at the same time, with --server.",
            metavar="N",
        ),
    ] = 2,
    server: Annotated[
        str | None,
        typer.Option(
            help="Ask an OpenAI-compatible server instead, such as http://localhost:8000/v1 (key: "
            "STILLHOUSE_SERVER_KEY).",
            metavar="URL",
        ),
    ] = None,
    server_model: Annotated[str, typer.Option(help="The model's name there.", metavar="NAME")] = "default",
    rate: Annotated[float | None, typer.Option(help="Requests a second, at most.", metavar="N")] = None,
    skip_long: Annotated[
        bool, typer.Option("--skip-long", help="Pass over samples that the server's context does not hold.")
    ] = False,
    cpu: Cpu = False,
    device: Device = None,
) -> None:
    """Store the outputs of a recipe's teacher. Students then train from the store: teacher: {store: FOLDER}."""
    from stillhouse.devices import on_device
    from stillhouse.runs import recipe as recipes
    from stillhouse.runs.caching import asked, describe, make_for, make_from_server, store_spec
    from stillhouse.training.display import Bars

    config = recipes.load(recipe, variant, set_ or [])
    _ready(out.parent, data_root)
    given = {"top": top, "precision": precision, "views": views, "embedding": embedding or None, "taps": tap}
    if server is not None:
        from stillhouse.store.server import Server

        chosen = store_spec({k: v for k, v in given.items() if v is not None})
        asked_of = Server(server, server_model, top=top or 20, rate=rate)
        make_from_server(
            config,
            asked_of,
            chosen,
            out,
            workers=jobs,
            too_long="skip" if skip_long else "refuse",
            data_root=data_root,
            live=Bars(),
        )
        typer.echo(describe(out))
        return
    spec = asked(config, teacher, {k: v for k, v in given.items() if v is not None})
    with on_device(device, cpu) as on_cpu:
        make_for(config, teacher, spec, out, engine=engine, jobs=jobs, data_root=data_root, cpu=on_cpu, live=Bars())
    if os.environ.get("RANK", "0") == "0":
        typer.echo(describe(out))


@app.command(epilog="Example: stillhouse export runs/digits-s0 --to safetensors --out student.safetensors")
def export(
    folder: Annotated[Path, typer.Argument(help="A finished run's folder, or a product folder.", metavar="RUN")],
    to: Annotated[
        str | None,
        typer.Option(
            help="A student: onnx (default), torch (torch.export, .pt2) or safetensors (weights alone). "
            "A synthetic set: folder (default; an ImageFolder, OUT/train/CLASS/*.png) or parquet (one file, as "
            "Hugging Face reads it).",
            metavar="FORMAT",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file or folder to write; default: next to the product.", metavar="PATH")
    ] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Allow a model that your own Python file builds.")
    ] = False,
) -> None:
    """Write a student or a synthetic set for other programs to load."""
    from stillhouse.runs.export import export as write

    write(folder, to, out, trust_code, typer.echo)


@app.command(epilog="Example: stillhouse predict runs/segmentation-s0 street.jpg --out found")
def predict(
    folder: Annotated[
        Path, typer.Argument(help="A finished run's folder, or a product folder.", metavar="RUN_OR_PRODUCT")
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(help="Images (files, or folders of them), texts, or two meshes to match.", metavar="INPUT…"),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write predictions.jsonl and pictures here.", metavar="FOLDER")
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class", help="Of a student that embeds texts: a class to choose among; repeat.", metavar="NAME"
        ),
    ] = None,
    texts: Annotated[
        list[str] | None, typer.Option("--text", help="Likewise, a whole text; repeat.", metavar="TEXT")
    ] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Allow a model that your own Python file builds.")
    ] = False,
) -> None:
    """Show what a student finds in images or texts: labels with probabilities, overlays, boxes, text."""
    from stillhouse.runs.prediction import predict as predictions

    for line in predictions(folder, inputs, out, trust_code, classes or (), texts or ()):
        typer.echo(line)


@app.command(epilog="Example: stillhouse report runs/digits-s0")
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A run's folder, finished or not, a comparison's, or a comparison's JSON, such as those in evidence/.",
            metavar="RUN",
        ),
    ],
) -> None:
    """Write the report of a run or a comparison again."""
    import json

    from stillhouse.errors import UserError
    from stillhouse.reporting.comparison import write_comparison_report
    from stillhouse.reporting.run_report import write_run_report

    results = folder if folder.suffix == ".json" and folder.is_file() else folder / "results.json"
    if (folder / "recipe.yaml").is_file():
        path = write_run_report(folder)
        if not (folder / "evaluation.json").is_file():
            typer.echo(
                "The run has not finished (the command that started it resumes it); this is what there is so far."
            )
    elif results.is_file():
        path = results.with_name("report.html") if results.name == "results.json" else Path(f"{results.stem}.html")
        try:
            found = json.loads(results.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"'{results}' is not JSON (line {error.lineno}: {error.msg}).") from None
        write_comparison_report(found, path)
    else:
        raise UserError(f"'{folder}' is no run's folder (no recipe.yaml) and no comparison's (no results.json).")
    typer.echo(f"Report: {path}")


@app.command(epilog="Example: stillhouse schema dm > dm.schema.json")
def schema(
    method: Annotated[str, typer.Argument(help="A method of the catalogue.", metavar="METHOD")] = "distillation",
) -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from stillhouse.runs.schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(method), indent=1))


@app.command(epilog="Example: stillhouse doctor")
def doctor(data_root: DataRoot = None) -> None:
    """Print versions, devices, folders and which extras are missing. Paste it into a bug report."""
    from stillhouse.reporting.installation import report

    for line in report(data_root):
        typer.echo(line)


@app.command(epilog="Example: stillhouse demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the runs.", metavar="FOLDER")] = Path("runs/demo"),
    seeds: Annotated[str, typer.Option(help="Seeds, comma separated.", metavar="NUMBERS")] = "0,1,2",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over.")] = False,
) -> None:
    """See distillation work on handwritten digits. A teacher and four students (alone, KD, NKD, PLD) in minutes, with
    no data to fetch."""
    from stillhouse.demo import demo as show

    numbers = _seeds(seeds)
    _ready(out)
    show(out, numbers, overwrite)


def main() -> None:
    """The entry point: turns a user's mistake, or a place that cannot be written, into one sentence and exit code 2."""
    import warnings

    from stillhouse.errors import UserError

    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            with _full_disk_reported():
                app()
        except UserError as error:
            typer.echo(f"stillhouse: {error}", err=True)
            sys.exit(2)
        except OSError as error:
            if error.errno not in _OF_PLACES or error.filename is None:
                raise
            typer.echo(
                f"stillhouse: Cannot read or write '{error.filename}': {str(error.strerror).lower()}. What was done "
                "before is unchanged.",
                err=True,
            )
            sys.exit(2)
        except KeyboardInterrupt:
            typer.echo("stillhouse: stopped; start the same command again to resume.", err=True)
            sys.exit(130)


@contextmanager
def _full_disk_reported() -> Iterator[None]:
    """`files.full_disk_reported`, imported when there is an error: `--help` imports little."""
    try:
        yield
    except Exception as error:
        from stillhouse.files import full_disk_reported

        with full_disk_reported("a file"):
            raise error


_OF_PLACES = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENAMETOOLONG,
)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Our own warnings as one sentence, without the line of code that gave them."""
    import warnings

    own = Path(filename).is_relative_to(Path(__file__).parent) and issubclass(category, UserWarning)
    typer.echo(
        f"stillhouse: {message}" if own else warnings.formatwarning(message, category, filename, lineno, line).rstrip(),
        err=True,
    )


if __name__ == "__main__":
    main()
