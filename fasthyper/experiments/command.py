"""The command `fasthyper compare`: run a comparison with a progress bar, and print its tables and findings."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .comparison import PRESETS, Comparison
from .experiment import Experiment
from .files import check_writable
from .summary import Summary


def run(name: str, *, out: str | None, data_home: str | None, workers: int | None, tune: bool, **options: Any) -> None:
    """Run the experiment of a name, or all; or list them.

    Args:
        name: of an experiment, ``"all"`` or ``"list"``.
        out: the folder of the results, by default ``results/NAME``.
        data_home: the folder of scikit-learn's downloads.
        workers: processes.
        tune: choose learning rates anew.
        options: the other arguments of `Comparison.of`.
    """
    from fasthyper.experiments import EXPERIMENTS

    if name == "list":
        width = max(map(len, EXPERIMENTS)) + 2
        for experiment in EXPERIMENTS.values():
            print(f"{experiment.name:<{width}}{experiment.title} ({', '.join(experiment.data)})")
        return
    if name not in EXPERIMENTS and name != "all":
        _fail(ValueError(f"name: {name!r} is not an experiment; known are all, {', '.join(EXPERIMENTS)}"))
    of_one = ("data", "studies", "methods", "depths", "lr", "width", "batch_size")
    if name == "all" and any(options[option] for option in of_one):
        _fail(ValueError("data, studies, methods, depths, lr, width and batch-size: of one experiment, not of all"))
    folder = Path(out or ("results" if name == "all" else f"results/{name}"))
    lists = {option: _split_list(options[option]) for option in ("studies", "methods")}
    try:
        chosen = {
            one: Comparison.of(EXPERIMENTS[one], **{**options, **lists})
            for one in (EXPERIMENTS if name == "all" else [name])
            if name != "all" or _has_studies(EXPERIMENTS[one], options["preset"])
        }
        if not chosen:
            raise ValueError(f"preset: no experiment has studies in the preset {options['preset']}")
        check_writable(folder)
    except ValueError as error:
        _fail(error)
    if name != "all":
        _run_and_print(chosen[name], folder, data_home, workers, tune)
        return
    summaries = [
        _run_and_print(comparison, folder / one, data_home, workers, tune) for one, comparison in chosen.items()
    ]
    if _is_main_process():
        _answer(summaries, folder)


def _has_studies(experiment: Experiment, preset: str) -> bool:
    """Return whether an experiment is one of a preset. An unknown preset is refused later."""
    return preset not in PRESETS or bool(experiment.studies(preset, experiment.data[0]))


def _split_list(text: str | None) -> list[str] | None:
    return None if text is None else [item.strip() for item in text.split(",")]


def _run_and_print(
    comparison: Comparison, out: Path, data_home: str | None, workers: int | None, tune: bool
) -> Summary:
    from fasthyper.experiments import DatasetUnavailable, WorkerFailed, run_comparison
    from fasthyper.experiments.distributed import in_one_line

    console = _console()
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
        bar.update(bar.task_ids[0], completed=done, total=total, description=f"{comparison.experiment.name}: {run}")

    def notify(problem: str) -> None:
        print(f"warning: {problem}", file=sys.stderr)

    resume = f"finished runs are kept in {out}; the same command goes on from there"
    try:
        try:
            summary = run_comparison(
                comparison, out, data_home=data_home, workers=workers, tune=tune, progress=progress, notify=notify
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
        print(f"stopped: {resume}", file=sys.stderr)
        raise SystemExit(130) from None
    if _is_main_process():
        _print_summary(console, summary, out)
    return summary


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)  # a log file has no width


def _is_main_process() -> bool:
    """Return whether this process prints: under torchrun, the one of rank 0."""
    from torch.distributed import is_torchelastic_launched

    return not is_torchelastic_launched() or os.environ.get("RANK", "0") == "0"


def _answer(summaries: list[Summary], folder: Path) -> None:
    from fasthyper.experiments.answer import PAGE_FILE, answer, write_answer

    write_answer(summaries, folder)
    console = _console()
    console.print()
    for question, text in answer(summaries):
        console.print(f"{question}: {text}", highlight=False, markup=False)
    console.print(f"The answer: {folder / PAGE_FILE}", highlight=False, soft_wrap=True)


def _print_summary(console: Console, summary: Summary, out: Path) -> None:
    from fasthyper.experiments.experiment import value_text
    from fasthyper.experiments.figures import short_name
    from fasthyper.experiments.outcome import outcome
    from fasthyper.experiments.report import PAGE_FILE, diverged, measured_text

    def say(text: str, **options: Any) -> None:
        console.print(text, highlight=False, markup=False, **options)

    say(f"\n{summary.comparison.experiment.title}, {summary.comparison.data}")
    for sentence in outcome(summary):
        say(f"  {sentence}")
    for results in summary.results:
        study = results.study
        say(f"\n{study.title}: {study.measure.heading}")
        view = Table(box=None, pad_edge=False)
        view.add_column(study.axis.field)
        by_line: dict[str, list[str]] = {}
        for row in results.rows():
            by_line.setdefault(short_name(row.line.label), []).append(measured_text(results, row))
        for value in study.values:
            view.add_column(value_text(value), justify="right")
        for label, cells in by_line.items():
            view.add_row(label, *cells)
        console.print(view)
        if lost := diverged(results):
            say(f"diverged: {'; '.join(lost)}")
    say("")
    if summary.findings:
        for line in _verdicts(summary, console.width):
            say(line)
    say(f"Report: {out / PAGE_FILE}", soft_wrap=True)


def _verdicts(summary: Summary, width: int) -> list[str]:
    """Return a table of the verdicts, a line each; the page has the claims in full."""
    from fasthyper.experiments.report import p_text, sign

    rows = [("  verdict", "p", "study", "claim")]
    for study, finding in summary.findings:
        verdict = f"{sign(finding.verdict)['sign']} {finding.verdict}"
        rows.append((verdict, p_text(finding), study.name, finding.short))
    widths = [max(len(row[n]) for row in rows) for n in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows]
    return [line if len(line) <= width else line[: width - 1] + "…" for line in lines]


def _fail(error: Exception | str, code: int = 2) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)
