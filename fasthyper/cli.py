"""The command line: `fasthyper compare | plan | info`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, NoReturn

if TYPE_CHECKING:
    from fasthyper.experiments import Comparison, Summary


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise SystemExit(
            f"fasthyper: this needs {', '.join(missing)}, not installed here: pip install fasthyper[compare]"
        )


_require("typer", "rich")

import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table  # noqa: E402

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Weights generated per instance, without ever writing them out.",
)
compare = typer.Typer(no_args_is_help=True, help="Compare hypernetworks with the embedding method.")
app.add_typer(compare, name="compare")


@compare.callback()
def _compare() -> None:
    """Keep `rotation` a command by name even while it is the only one."""


@compare.command()
def rotation(
    data: Annotated[str, typer.Option(help="digits, mnist or cifar10.")] = "digits",
    data_home: Annotated[str | None, typer.Option(help="Folder of scikit-learn's downloads.")] = None,
    depths: Annotated[str | None, typer.Option(help="Layers of f and e, as 2-9 or 2,4,8.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Repetitions of each run.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of SGD.")] = None,
    width: Annotated[int | None, typer.Option(help="Hidden units of f and e.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a training batch.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[str, typer.Option(help="Folder for runs, table, picture and report.")] = "results/rotation",
) -> None:
    """By how much was an image turned? Galanti and Wolf, NeurIPS 2020. What is not given depends on the data.

    Stopped and started again, it goes on where it was.
    """
    _require("sklearn", "numpy", "scipy", "matplotlib", "pandas")
    from fasthyper.experiments import ROTATION, Comparison
    from fasthyper.experiments.files import check_writable
    from fasthyper.experiments.runner import FILES

    try:
        comparison = Comparison.of(
            ROTATION,
            data,
            depths=depths,
            seeds=seeds,
            epochs=epochs,
            lr=lr,
            width=width,
            batch_size=batch_size,
            device=device,
        )
        check_writable(out, *FILES)
    except ValueError as error:
        _fail(error)
    _run(comparison, Path(out), data_home)


@app.command()
def plan(
    batch: Annotated[int, typer.Option(help="B: instances, each with its own weights.")],
    points: Annotated[int, typer.Option(help="N: points per instance.")],
    cond: Annotated[int, typer.Option(help="R: features that condition the weights.")],
    in_: Annotated[int, typer.Option("--in", help="I: in features.")],
    out: Annotated[int, typer.Option(help="O: out features.")],
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Print what each order of contraction would cost, which one is taken, and why."""
    from fasthyper.explain import explain

    try:
        text = explain(
            batch=batch,
            points=points,
            cond=cond,
            in_features=in_,
            out_features=out,
            dtype=dtype,
            device=device,
        )
    except ValueError as error:
        _fail(error)
    typer.echo(text)


@app.command()
def info() -> None:
    """Print versions, devices, the backends that are ready, and for the others why not."""
    from fasthyper import info

    typer.echo(info.report())


def _run(comparison: Comparison, out: Path, data_home: str | None) -> None:
    from fasthyper.experiments import DatasetUnavailable, run_comparison

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log has no width of its own, and the table needs this much
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs,"),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    # Runs differ in speed: estimate the time left over several of them.
    bar = Progress(*columns, console=console, speed_estimate_period=120)

    def progress(done: int, total: int, run: str) -> None:
        if not bar.tasks:
            bar.add_task(run, total=total)
            bar.start()
        bar.update(bar.task_ids[0], completed=done, description=run)

    def notify(problem: str) -> None:
        typer.echo(f"warning: {problem}", err=True)

    try:
        try:
            summary = run_comparison(comparison, out, data_home=data_home, progress=progress, notify=notify)
        finally:
            if bar.tasks:
                bar.stop()
    except DatasetUnavailable as error:
        _fail(error, code=1)
    except KeyboardInterrupt:
        typer.echo(f"stopped: finished runs are kept in {out}; the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    _print(console, summary, out)


def _print(console: Console, summary: Summary, out: Path) -> None:
    from fasthyper.experiments.report import COLUMNS, table

    # To fit the 80 columns of a terminal: headings in short lines, a method's formula only in the report.
    title = f"\n{summary.comparison.experiment.title}, {summary.comparison.data}"
    view = Table(box=None, pad_edge=False, padding=(0, 2 if console.width >= 110 else 1, 0, 0), title=title)
    for number, column in enumerate(COLUMNS):
        heading = column if console.width >= 110 else fill(column, 9)
        view.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for cells in table(summary):
        view.add_row(cells[0].split()[0], *cells[1:])
    console.print(view)
    console.print()
    for finding in summary.findings:
        console.print(f"{finding.claim}: {finding.verdict}", highlight=False)
    console.print(f"Report: {out / 'report.md'}", highlight=False, soft_wrap=True)


def _fail(error: Exception, code: int = 2) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the command `fasthyper`."""
    app()


if __name__ == "__main__":
    main()
