"""The command line: `fasthyper compare | plan | info`."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
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


@app.command()
def compare(
    name: Annotated[str, typer.Argument(help="The name of an experiment, `all`, or `list`.")],
    preset: Annotated[str, typer.Option(help="quick: minutes on two cores; paper: the full protocol.")] = "quick",
    data: Annotated[str | None, typer.Option(help="The data set; the default needs no network.")] = None,
    data_home: Annotated[str | None, typer.Option(help="Folder of scikit-learn's downloads.")] = None,
    studies: Annotated[str | None, typer.Option(help="Only these figures, such as depth,rate.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these methods, such as hypernetwork,film.")] = None,
    depths: Annotated[
        str | None, typer.Option(help="Only the figure over depth, with these depths of f and e: 2-9 or 2,4,8.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of each method at each value.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training examples.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    width: Annotated[int | None, typer.Option(help="Hidden units of f and e.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a training batch.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[int | None, typer.Option(help="Processes; by default one for each core, or each GPU.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for runs, table and report; by default results/NAME.")] = None,
) -> None:
    """Compare hypernetworks with other ways to condition a network: the experiments of Galanti and Wolf, and others.

    Start a stopped comparison again to continue it. Under torchrun, the processes share the runs.
    """
    _require("sklearn", "numpy", "scipy", "matplotlib", "pandas", "jinja2")
    from fasthyper.experiments import EXPERIMENTS, Comparison
    from fasthyper.experiments.files import check_writable

    if name == "list":
        for experiment in EXPERIMENTS.values():
            typer.echo(f"{experiment.name:<14}{experiment.title} ({', '.join(experiment.data)})")
        return
    if name not in EXPERIMENTS and name != "all":
        _fail(ValueError(f"name: {name!r} is not an experiment; known are all, {', '.join(EXPERIMENTS)}"))
    if name == "all" and any((data, studies, methods, depths, lr, width, batch_size)):
        _fail(ValueError("data, studies, methods, depths, lr, width and batch-size: of one experiment, not of all"))
    folder = Path(out or ("results" if name == "all" else f"results/{name}"))
    try:
        chosen = {
            one: Comparison.of(
                EXPERIMENTS[one],
                data,
                preset=preset,
                studies=_split_list(studies),
                methods=_split_list(methods),
                depths=depths,
                seeds=seeds,
                device=device,
                epochs=epochs,
                lr=lr,
                width=width,
                batch_size=batch_size,
            )
            for one in (EXPERIMENTS if name == "all" else [name])
        }
        check_writable(folder)
    except ValueError as error:
        _fail(error)
    if name != "all":
        _run_and_print(chosen[name], folder, data_home, workers)
        return
    from fasthyper.experiments.report import write_combined

    summaries = [_run_and_print(comparison, folder / one, data_home, workers) for one, comparison in chosen.items()]
    if _is_main_process():
        write_combined(summaries, folder)
        typer.echo(f"All of them: {folder / 'report.html'}")


@app.command()
def plan(
    cond: Annotated[int, typer.Option(help="R: features that condition the weights.")],
    in_: Annotated[int, typer.Option("--in", help="I: in features.")],
    out: Annotated[int, typer.Option(help="O: out features.")],
    batch: Annotated[int | None, typer.Option(help="B: instances, each with its own weights.")] = None,
    points: Annotated[int, typer.Option(help="N: points per instance, or rows of x per source.")] = 1,
    edges: Annotated[int | None, typer.Option(help="E: instead of B, the terms of an incidence.")] = None,
    sources: Annotated[int | None, typer.Option(help="S: rows of x; default E, nothing shared.")] = None,
    conds: Annotated[int | None, typer.Option(help="C: rows of z; default E, nothing shared.")] = None,
    targets: Annotated[int | None, typer.Option(help="T: rows of y; default E, nothing shared.")] = None,
    image: Annotated[str | None, typer.Option(help="Pixels of a convolution's image, such as 14x14.")] = None,
    kernel: Annotated[str, typer.Option(help="Its taps, such as 3 or 3x5.")] = "1",
    stride: Annotated[int, typer.Option(help="Its stride.")] = 1,
    padding: Annotated[int, typer.Option(help="Its padding.")] = 0,
    dilation: Annotated[int, typer.Option(help="Its dilation.")] = 1,
    groups: Annotated[int, typer.Option(help="Its groups of channels.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[str, typer.Option(help="A name that `fasthyper info` lists, or auto.")] = "auto",
) -> None:
    """Print the cost of each order of contraction, the one that is chosen, and why."""
    from fasthyper.explain import explain, explain_convolution

    try:
        if image is not None:
            if batch is None:
                raise ValueError("batch must be given with image")
            text = explain_convolution(
                batch=batch,
                cond=cond,
                in_channels=in_,
                out_channels=out,
                image=_sizes("image", image),
                kernel=_sizes("kernel", kernel),
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
                dtype=dtype,
                device=device,
                backend=backend,
            )
            return typer.echo(text)
        if kernel != "1" or (stride, padding, dilation, groups) != (1, 0, 1, 1):
            raise ValueError("image must be given with kernel, stride, padding, dilation or groups")
        text = explain(
            batch=batch,
            points=points,
            cond=cond,
            in_features=in_,
            out_features=out,
            edges=edges,
            sources=sources,
            conds=conds,
            targets=targets,
            dtype=dtype,
            device=device,
            backend=backend,
        )
    except ValueError as error:
        _fail(error)
    typer.echo(text)


@app.command()
def info() -> None:
    """Print versions, devices, and the backends: which are ready, and why the others are not."""
    from fasthyper import info

    typer.echo(info.describe())


def _sizes(name: str, text: str) -> list[int]:
    """Return the numbers of a text such as 14x14."""
    try:
        return [int(size) for size in text.lower().split("x")]
    except ValueError:
        raise ValueError(f"{name} must be a size such as 14 or 14x14, got {text!r}") from None


def _split_list(text: str | None) -> list[str] | None:
    return None if text is None else [item.strip() for item in text.split(",")]


def _run_and_print(comparison: Comparison, out: Path, data_home: str | None, workers: int | None) -> Summary:
    from fasthyper.experiments import DatasetUnavailable, WorkerFailed, run_comparison
    from fasthyper.experiments.distributed import in_one_line

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log file has no width
    # Runs differ in speed: estimate the time left from several of them.
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total} runs,"),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        speed_estimate_period=120,
    )

    def progress(done: float, total: int, run: str) -> None:
        if not bar.tasks:
            bar.add_task(comparison.experiment.name, total=total)
            bar.start()
        bar.update(bar.task_ids[0], completed=done, description=f"{comparison.experiment.name}: {run}")

    def notify(problem: str) -> None:
        typer.echo(f"warning: {problem}", err=True)

    resume = f"finished runs are kept in {out}; the same command goes on from there"
    try:
        try:
            summary = run_comparison(
                comparison, out, data_home=data_home, workers=workers, progress=progress, notify=notify
            )
        finally:
            if bar.tasks:
                bar.stop()
    except DatasetUnavailable as error:
        _fail(error, code=1)
    except ValueError as error:
        _fail(error)
    except (RuntimeError, MemoryError, OSError) as error:  # of this process, or of a worker
        reason = str(error) if isinstance(error, WorkerFailed) else in_one_line(error)
        _fail(f"{comparison.experiment.name}: {reason}; {resume}", code=1)
    except KeyboardInterrupt:
        typer.echo(f"stopped: {resume}", err=True)
        raise typer.Exit(130) from None
    if _is_main_process():
        _print_summary(console, summary, out)
    return summary


def _is_main_process() -> bool:
    """Return whether this process prints: under torchrun, the one of rank 0."""
    from torch.distributed import is_torchelastic_launched

    return not is_torchelastic_launched() or os.environ.get("RANK", "0") == "0"


def _print_summary(console: Console, summary: Summary, out: Path) -> None:
    from fasthyper.experiments.experiment import value_text
    from fasthyper.experiments.report import measured_text

    for results in summary.results:
        study = results.study
        title = f"\n{summary.comparison.experiment.title}, {summary.comparison.data}: {study.measure.heading}"
        view = Table(box=None, pad_edge=False, title=title)
        view.add_column(study.axis.field)
        by_line: dict[str, list[str]] = {}
        for row in results.rows():
            by_line.setdefault(row.line.label, []).append(measured_text(results, row))
        for value in study.values:
            view.add_column(value_text(value), justify="right")
        for label, cells in by_line.items():
            view.add_row(label, *cells)
        console.print(view)
    console.print()
    for study, finding in summary.findings:
        console.print(f"{study.name}: {finding.claim} ({finding.whose}): {finding.verdict}", highlight=False)
    console.print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True)


def _fail(error: Exception | str, code: int = 2) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Run the command `fasthyper`."""
    app()


if __name__ == "__main__":
    main()
