"""The command: parses, calls, prints. Exit codes: 0 done, 2 the user's mistake, 1 ours. `--help` and `methods` import no torch."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from stillhouse.catalog import Card
    from stillhouse.run import Stage

app = typer.Typer(
    name="stillhouse",
    help="Knowledge distillation under one roof: make a small model carry what a big one knows.\n\nStart with: stillhouse demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Recipe = Annotated[Path, typer.Argument(help="A recipe file (YAML).", metavar="RECIPE")]
Sets = Annotated[Optional[list[str]], typer.Option("--set", help="Override a key: train.epochs=3. May be given several times.", metavar="KEY=VALUE")]  # noqa: UP045
DataRoot = Annotated[Optional[str], typer.Option(help="Folder that holds the data sets; default: STILLHOUSE_DATA.", metavar="FOLDER")]  # noqa: UP045
Cpu = Annotated[bool, typer.Option("--cpu", help="Use no GPU.")]


def _version(value: bool) -> None:
    if value:
        from stillhouse import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


@app.command(epilog="Example: stillhouse run recipes/classification/nkd_uskd.yaml --set train.epochs=5 --data-root ~/data")
def run(
    recipe: Recipe,
    set_: Sets = None,
    variant: Annotated[Optional[str], typer.Option(help="One of the recipe's variants, such as paper.", metavar="NAME")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="The run's folder; default: runs/NAME-sSEED.")] = None,  # noqa: UP045
    data_root: DataRoot = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and the plan; train nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over in a folder that holds a run.")] = False,
    cpu: Cpu = False,
) -> None:
    """Run a recipe. Trains what it names, keeps the product, writes the report; a run that was cut off goes on."""
    from stillhouse import recipe as recipes

    config = recipes.load(recipe, variant, set_ or [])
    if dry_run:
        from stillhouse.run import plan

        typer.echo(recipes.dump(config))
        _print_plan(plan(config, data_root=data_root))
        return
    from stillhouse.live import Bars
    from stillhouse.reporting.quantities import quantity
    from stillhouse.run import execute

    folder = out or Path("runs") / f"{config.name}-s{config.seed}"
    figures = execute(config, folder, data_root=data_root, live=Bars(), overwrite=overwrite, cpu=cpu)
    if os.environ.get("RANK", "0") == "0":
        for name, value in figures.items():
            typer.echo(f"{name:<16} {quantity(name, value).text(value)}")
        typer.echo(f"\nReport: {folder / 'report.html'}\nUse it: stillhouse.load({str(folder)!r})")


def _print_plan(stages: list[Stage]) -> None:
    typer.echo("Plan:")
    for number, stage in enumerate(stages, 1):
        typer.echo(f"  {number}. {stage.name}: {stage.does}" + (f", {stage.steps:,} steps" if stage.steps is not None else ""))
        for role, text in stage.models.items():
            typer.echo(f"     {role}: {text}")
        for name, path in stage.taps.items():
            typer.echo(f"     tap {name}: {path}")


@app.command(epilog="Example: stillhouse methods nkd_uskd")
def methods(
    name: Annotated[Optional[str], typer.Argument(help="A method or an objective; without it, all are listed.", metavar="NAME")] = None,  # noqa: UP045
) -> None:
    """List methods and objectives, or show one."""
    from stillhouse import catalog

    if name is not None:
        _print_card(catalog.card(name))
        return
    width = max(shutil.get_terminal_size((150, 24)).columns, 80)
    by_kind = {"method": "Methods (method: NAME)", "objective": "Objectives (listed under objectives:)"}
    for kind, heading in by_kind.items():
        typer.echo(heading)
        for card in catalog.list_methods():
            if card.kind == kind:
                shown = ", ".join(card.provides)
                summary = card.title.partition(": ")[2] or card.title
                summary = summary[0].upper() + summary[1:]
                room = width - 27
                typer.echo(f"  {shown:<24} {summary if len(summary) <= room else summary[: room - 1] + '…'}")


def _print_card(card: Card) -> None:
    typer.echo(card.title)
    for key, value in card.fields.items():
        typer.echo(f"  {key:<9} {value}")
    if card.text:
        typer.echo("\n" + card.text)
    import importlib.util

    from stillhouse import catalog

    if card.kind == "objective" and importlib.util.find_spec("torch"):
        for name in card.provides:
            typer.echo(f"\nOptions of {name}:")
            for key, field in catalog.options(catalog.objective(name)).model_fields.items():
                typer.echo(f"  {key}: {_type_name(field.annotation)}" + ("" if field.is_required() else f" = {field.default!r}"))
    if card.kind == "method" and importlib.util.find_spec("torch"):
        typer.echo(f"\nKeys of a recipe with method: {card.slug} (beside name, seed and variants; stillhouse schema {card.slug} has all):")
        from stillhouse.recipe import MethodConfig

        for key, field in catalog.method(card.slug).Config.model_fields.items():
            if key in MethodConfig.model_fields:
                continue
            typer.echo(f"  {key}: {_type_name(field.annotation)}" + (f"  {field.description}" if field.description else ""))
    evidence = Path("evidence") / f"{card.slug}.json"
    recipe = next(Path("recipes").rglob(f"{card.slug}.yaml"), None) if Path("recipes").is_dir() else None
    if recipe is not None:
        typer.echo(f"\nTry it: stillhouse run {recipe}")
    if evidence.is_file():
        import json

        from stillhouse.reporting.comparison import comparison_markdown

        typer.echo("\nEvidence (" + str(evidence) + "):\n" + comparison_markdown(json.loads(evidence.read_text())))


def _type_name(annotation: Any) -> str:
    import re

    text = annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)


@app.command(epilog="Example: stillhouse bench recipes/classification/pld.yaml --seeds 0,1,2 --evidence evidence/pld.json")
def bench(
    recipe: Annotated[list[Path], typer.Argument(help="Recipes; each of them and each of its variants is a row.", metavar="RECIPE")],
    variants: Annotated[
        str | None, typer.Option(help="Variants, comma separated; base is the recipe itself. Default: base and all but paper… and smoke.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, comma separated.")] = "0,1,2",
    baseline: Annotated[Optional[str], typer.Option(help="The row that the others are compared with; default: alone, ce, or the first.")] = None,  # noqa: UP045
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="The row whose training step is the unit of cost, where recipes measure it (evaluate: [step]); default: kd, or the baseline."
        ),
    ] = None,
    primary: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The figure that rows are compared by, such as nll; default: accuracy, or the first that there is."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder of the runs; default: runs/bench-NAME.")] = None,  # noqa: UP045
    evidence: Annotated[Optional[Path], typer.Option(help="Also write the results as JSON here.")] = None,  # noqa: UP045
    set_: Sets = None,
    data_root: DataRoot = None,
    engine: Annotated[str, typer.Option(help="local, or ray.")] = "local",
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs at the same time.")] = 1,
    cpu: Cpu = False,
) -> None:
    """Compare recipes and variants over seeds. Runs that are done are kept; a second start goes on."""
    import json

    from rich.console import Console

    from stillhouse.bench import bench as run_bench
    from stillhouse.bench import entries
    from stillhouse.live import Bars
    from stillhouse.reporting.comparison import comparison_table, write_comparison_report

    rows = entries(recipe, None if variants is None else [v.strip() for v in variants.split(",")])
    folder = out or Path("runs") / f"bench-{recipe[0].stem}"
    results = run_bench(
        rows,
        _seeds(seeds),
        folder,
        baseline=baseline,
        reference=reference,
        primary=primary,
        sets=set_ or [],
        data_root=data_root,
        cpu=cpu,
        engine=engine,
        jobs=jobs,
        slug=evidence.stem if evidence else recipe[0].stem,
        live=Bars(),
        after=lambda job, n, total: typer.echo(f"[{n}/{total}] {job.folder.name} done", err=True),
    )
    results["command"] = " ".join(["stillhouse", *_without_places(sys.argv[1:])])
    for path in filter(None, (folder / "results.json", evidence)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    write_comparison_report(results, folder / "report.html")
    Console().print(comparison_table(results))
    typer.echo(f"Report: {folder / 'report.html'}")


def _without_places(arguments: list[str]) -> list[str]:
    """A command's arguments without the folders of one machine."""
    out, skip = [], False
    for argument in arguments:
        if skip or argument.partition("=")[0] in ("--out", "--data-root"):
            skip = not skip and "=" not in argument
            continue
        out.append(argument)
    return out


def _seeds(text: str) -> list[int]:
    from stillhouse.errors import UserError

    try:
        return [int(s) for s in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds takes whole numbers separated by commas, such as 0,1,2; given: '{text}'.") from None


@app.command(epilog="Example: stillhouse cache recipes/classification/kd.yaml --out stores/kd --top 5 --precision fp16 --views 15")
def cache(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="The store's folder; one that was cut off goes on.", metavar="FOLDER")],
    top: Annotated[Optional[int], typer.Option(help="Keep the k most probable classes and the mass of the others; default: all.")] = None,  # noqa: UP045
    precision: Annotated[Optional[str], typer.Option(help="fp32, fp16, bf16 or int8; default: fp32.")] = None,  # noqa: UP045
    views: Annotated[Optional[int], typer.Option(help="Augmented views of each sample; default: 1.")] = None,  # noqa: UP045
    embedding: Annotated[bool, typer.Option("--embedding", help="Keep the embedding too.")] = False,
    tap: Annotated[Optional[list[str]], typer.Option(help="Keep this tap too. May be given several times.")] = None,  # noqa: UP045
    teacher: Annotated[str, typer.Option(help="Which of the recipe's teachers.")] = "teacher",
    set_: Sets = None,
    variant: Annotated[Optional[str], typer.Option(help="One of the recipe's variants.", metavar="NAME")] = None,  # noqa: UP045
    data_root: DataRoot = None,
    engine: Annotated[str, typer.Option(help="local (under torchrun: every process takes its share), or ray.")] = "local",
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Workers, with --engine ray; requests at the same time, with --server.")] = 2,
    server: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Ask an OpenAI-compatible server instead, such as http://localhost:8000/v1 (key: STILLHOUSE_SERVER_KEY).", metavar="URL"),
    ] = None,
    server_model: Annotated[str, typer.Option(help="The model's name there.", metavar="NAME")] = "default",
    rate: Annotated[Optional[float], typer.Option(help="Requests a second, at most.")] = None,  # noqa: UP045
    skip_long: Annotated[bool, typer.Option("--skip-long", help="Pass over samples that the server's context does not hold.")] = False,
    cpu: Cpu = False,
) -> None:
    """Keep what a recipe's teacher says of its data. Students then train from the store: teacher: {store: FOLDER}."""
    from stillhouse import recipe as recipes
    from stillhouse.live import Bars
    from stillhouse.store.making import asked, describe, make_for, make_from_server, store_spec

    config = recipes.load(recipe, variant, set_ or [])
    given = {"top": top, "precision": precision, "views": views, "embedding": embedding or None, "taps": tap}
    if server is not None:
        from stillhouse.store.server import Server

        spec = store_spec({k: v for k, v in given.items() if v is not None})
        asked_of = Server(server, server_model, top=top or 20, rate=rate)
        make_from_server(config, asked_of, spec, out, workers=jobs, too_long="skip" if skip_long else "refuse", data_root=data_root, live=Bars())
        typer.echo(describe(out))
        return
    spec = asked(config, teacher, {k: v for k, v in given.items() if v is not None})
    make_for(config, teacher, spec, out, engine=engine, jobs=jobs, data_root=data_root, cpu=cpu, live=Bars())
    if os.environ.get("RANK", "0") == "0":
        typer.echo(describe(out))


@app.command(epilog="Example: stillhouse export runs/nkd_uskd-s0 --to onnx --out student.onnx, or runs/dm-s0 --to folder --out small")
def export(
    folder: Annotated[Path, typer.Argument(help="A finished run's folder, or a product folder.", metavar="RUN")],
    to: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="A student: onnx (default), torch (torch.export, .pt2) or safetensors (weights alone). "
            "A synthetic set: folder (default; an ImageFolder, OUT/train/CLASS/*.png) or parquet (one file, as Hugging Face reads it).",
            metavar="FORMAT",
        ),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="The file or folder to write; default: beside the product.")] = None,  # noqa: UP045
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Allow a model that your own Python file builds.")] = False,
) -> None:
    """Write a student or a synthetic set for other programs to load."""
    from stillhouse.export import check_format, write
    from stillhouse.product import load_product
    from stillhouse.synthetic.exchange import left_out
    from stillhouse.synthetic.product import SyntheticSet

    check_format(to)
    product = load_product(folder, trust_code)
    path = write(product, folder, to, out)
    if not isinstance(product, SyntheticSet):
        typer.echo(f"Wrote {path}")
        return
    count = len(product.training_images()[1])
    typer.echo(f"Wrote {count} images of {len(product.classes)} classes: {path}")
    for sentence in left_out(product, to or "folder"):
        typer.echo(sentence)
    real = (product.made_by.get("data") or {}).get("name", "NAME")
    typer.echo(f"Train on it: data: {{name: 'synthetic:{path}', options: {{real: '{real}'}}}}")


@app.command(epilog="Example: stillhouse report runs/nkd_uskd-s0")
def report(
    folder: Annotated[
        Path, typer.Argument(help="A run's folder, finished or not, a comparison's, or a comparison's JSON, such as those in evidence/.")
    ],
) -> None:
    """Write a run's or comparison's report anew."""
    import json

    from stillhouse.errors import UserError
    from stillhouse.reporting.comparison import write_comparison_report
    from stillhouse.reporting.run_report import write_run_report

    results = folder if folder.suffix == ".json" and folder.is_file() else folder / "results.json"
    if (folder / "recipe.yaml").is_file():
        path = write_run_report(folder)
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


@app.command(epilog="Example: stillhouse schema > stillhouse.schema.json")
def schema(method: Annotated[str, typer.Argument(help="A method's slug.")] = "distillation") -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from stillhouse.schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(method), indent=1))


@app.command(epilog="Example: stillhouse demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/demo"),
    seeds: Annotated[str, typer.Option(help="Seeds, comma separated.")] = "0,1,2",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over.")] = False,
) -> None:
    """See distillation work on handwritten digits. A teacher and four students (alone, KD, NKD, PLD) in minutes, with no data to fetch."""
    from stillhouse.demo import demo as show

    show(out, _seeds(seeds), overwrite)


def main() -> None:
    """The entry point: turns a user's mistake into one sentence and exit code 2."""
    from stillhouse.errors import UserError

    try:
        app()
    except UserError as error:
        typer.echo(f"stillhouse: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("stillhouse: stopped; start the same command again to go on.", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
