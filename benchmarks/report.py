"""`python -m benchmarks report`: write the pages, figures and marked sections of all files of results.

For each file: a page (`page.py`) and figures (`plots.py`) beside it. For the newest machine of each kind of device, by
its file with the most threads: a section in README.md and in docs/performance.md (`sections.py`).
"""

from __future__ import annotations

from pathlib import Path

from . import page, plots, records, sections
from .analysis import Results
from .context import ROOT
from .records import FORWARD_BACKWARD, RESULTS, Record

FIGURES = {
    "speedups": (plots.speedups, "workloads"),
    "scaling": (plots.scaling, "scaling"),
    "roofline": (plots.roofline, "workloads"),
    "training": (plots.training, "training"),
}
"""The name of each figure, the function that draws it, and the study that it shows."""

DOCUMENTS = {"README.md": sections.short, "docs/performance.md": sections.full}
"""The documents with marked sections, and the function that returns their text."""


def write_all(folder: Path = RESULTS, root: Path = ROOT) -> list[Path]:
    """Write everything and return the written paths. Of the documents, only those with a marked section are written.

    Args:
        folder: the files of results.
        root: the folder of `DOCUMENTS`. Documents that do not exist are skipped.
    """
    written: list[Path] = []
    files: dict[str, list[tuple[Results, Path]]] = {}
    for source in sorted(folder.glob("*.csv")):
        found = records.read(source)
        if not found:
            continue
        figures = _draw(found, source)
        markdown = source.with_suffix(".md")
        markdown.write_text(page.markdown(found, [path.name for path in figures]), encoding="utf-8")
        written += [markdown, *figures]
        if any((r.study, r.mode) == ("workloads", FORWARD_BACKWARD) for r in found):
            results = Results(found)
            files.setdefault(results.context.kind, []).append((results, source))
    for kind, group in files.items():
        (main, source), *others = _of_newest_machine(group)
        for name, text in DOCUMENTS.items():
            document = root / name
            given = main.records, source, document.parent, [results.records for results, _ in others]
            if document.exists() and sections.replace(document, kind, text(*given)):
                written.append(document)
    return list(dict.fromkeys(written))


def _of_newest_machine(files: list[tuple[Results, Path]]) -> list[tuple[Results, Path]]:
    """Return the files of the machine that was measured last, that with the most threads first."""
    newest = max((results for results, _ in files), key=lambda results: max(r.context.date for r in results.records))
    of_machine = [one for one in files if one[0].context.machine == newest.context.machine]
    return sorted(of_machine, key=lambda one: -one[0].context.threads)


def _draw(found: list[Record], source: Path) -> list[Path]:
    """Draw each figure that has records, and delete old figures that have none."""
    results, written = Results(found), []
    for name, (draw, study) in FIGURES.items():
        path = source.with_name(f"{source.stem}-{name}.png")
        if results.select(study):
            draw(found).savefig(path, metadata={"Software": None})
            written.append(path)
        else:
            path.unlink(missing_ok=True)
    return written
