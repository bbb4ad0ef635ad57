"""The command line: `fasthyper info | plan | build | compare`. All but the last need only torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

COMPARE_OPTIONS: dict[str, tuple[type, Any, str]] = {
    "preset": (str, "quick", "quick: minutes on two cores; standard: an hour or two; paper: the full protocol."),
    "data": (str, None, "The data set; the default needs no network."),
    "data-home": (str, None, "Folder of scikit-learn's downloads."),
    "studies": (str, None, "Only these figures, such as depth,rate."),
    "methods": (str, None, "Only these methods, such as hypernetwork,film."),
    "depths": (str, None, "Only the figure over depth, with these depths of f and e: 2-9 or 2,4,8."),
    "seeds": (int, None, "Runs of each method at each value."),
    "epochs": (int, None, "Passes over the training examples."),
    "lr": (float, None, "Learning rate of all runs; without it, each method is tuned."),
    "width": (int, None, "Hidden units of f and e."),
    "batch-size": (int, None, "Examples in a training batch."),
    "device": (str, "auto", "auto, cpu or cuda."),
    "workers": (int, None, "Processes; by default one for each core, or each GPU."),
    "out": (str, None, "Folder for runs, table and report; by default results/NAME."),
}
PLAN_OPTIONS: dict[str, tuple[type, Any, str]] = {
    "batch": (int, None, "B: instances, each with its own weights."),
    "points": (int, 1, "N: points per instance, or rows of x per source."),
    "edges": (int, None, "E: instead of B, the terms of an incidence."),
    "sources": (int, None, "S: rows of x; default E, nothing shared."),
    "conds": (int, None, "C: rows of z; default E, nothing shared."),
    "targets": (int, None, "T: rows of y; default E, nothing shared."),
    "image": (str, None, "Pixels of a convolution's image, such as 14x14."),
    "kernel": (str, "1", "Its taps, such as 3 or 3x5."),
    "stride": (int, 1, "Its stride."),
    "padding": (int, 0, "Its padding."),
    "dilation": (int, 1, "Its dilation."),
    "groups": (int, 1, "Its groups of channels."),
    "dtype": (str, "float32", "float32, float64, bfloat16 or float16."),
    "device": (str, "cpu", "cpu or cuda."),
    "backend": (str, "auto", "A name that `fasthyper info` lists, or auto."),
}
"""The options of a command by name: the type, the default, the help."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser("fasthyper", description="Weights generated per instance, without writing them out.")
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    def command(run: Any, about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(run.__name__, help=about, description=run.__doc__, allow_abbrev=False)
        made.set_defaults(run=run)
        return made

    command(info, "versions, devices, and the backends: which are ready, and why the others are not")
    made = command(plan, "the cost of each order of contraction, the one that is chosen, and why")
    for name, about in (("cond", "R: features that condition the weights."), ("in", "I: in features.")):
        made.add_argument(f"--{name}", type=int, required=True, help=about)
    made.add_argument("--out", type=int, required=True, help="O: out features.")
    _add(made, PLAN_OPTIONS)
    made = command(build, "compile the kernels for the installed torch")
    made.add_argument("names", nargs="*", metavar="NAME", help="A library, such as cpu_avx2, eager or cuda.")
    made.add_argument(
        "--all", action="store_true", help="All libraries that can be built here, for any processor and GPU."
    )
    made.add_argument("--force", action="store_true", help="Also what is built already.")
    made.add_argument("--remove", action="store_true", help="Delete all built kernels from the cache instead.")
    made = command(compare, "the experiments that compare hypernetworks with other ways")
    made.add_argument("name", metavar="NAME", help="The name of an experiment, `all`, or `list`.")
    _add(made, COMPARE_OPTIONS)
    made.add_argument(
        "--tune", action="store_true", help="Choose learning rates anew, also those that the package has for quick."
    )
    return top


def _add(made: argparse.ArgumentParser, options: dict[str, tuple[type, Any, str]]) -> None:
    for name, (kind, default, about) in options.items():
        about = about if default is None else f"{about} Default: {default}."
        made.add_argument(f"--{name}", type=kind, default=default, help=about)


def compare(name: str, **options: Any) -> None:
    """Compare hypernetworks with other ways to condition a network: the experiments of Galanti and Wolf, and others.

    Start a stopped comparison again to continue it. Under torchrun, the processes share the runs.
    """
    needed = ("rich", "sklearn", "numpy", "scipy", "matplotlib", "pandas", "jinja2")
    if missing := [package for package in needed if find_spec(package) is None]:
        what = ", ".join(missing)
        raise SystemExit(f"fasthyper: this needs {what}, not installed here: pip install fasthyper[compare]")
    from fasthyper.experiments.command import run

    run(name, **options)


def plan(**options: Any) -> None:
    """Print the cost of each order of contraction, the one that is chosen, and why."""
    from fasthyper.explain import explain, explain_convolution

    of_image = {name: options.pop(name) for name in ("image", "kernel", "stride", "padding", "dilation", "groups")}
    of_terms = {name: options.pop(name) for name in ("points", "edges", "sources", "conds", "targets")}
    in_, out = options.pop("in"), options.pop("out")
    try:
        if of_image["image"] is not None:
            if options["batch"] is None:
                raise ValueError("batch must be given with image")
            of_image.update({name: _sizes(name, of_image[name]) for name in ("image", "kernel")})
            text = explain_convolution(in_channels=in_, out_channels=out, **options, **of_image)
        elif any(of_image[name] != PLAN_OPTIONS[name][1] for name in of_image):
            raise ValueError("image must be given with kernel, stride, padding, dilation or groups")
        else:
            text = explain(in_features=in_, out_features=out, **options, **of_terms)
    except ValueError as error:
        _fail(error)
    print(text)


def info() -> None:
    """Print versions, devices, and the backends: which are ready, and why the others are not."""
    from fasthyper import info

    print(info.describe())


def build(names: Sequence[str], all: bool, force: bool, remove: bool) -> None:
    """Compile the kernels for the installed torch into the user's cache.

    By default those that this machine uses; `fasthyper info` then shows whether they are ready.
    """
    from fasthyper import build_command

    try:
        print(build_command.remove() if remove else build_command.build(names, every=all, force=force))
    except (ValueError, RuntimeError) as error:
        _fail(error, code=1)
    except KeyboardInterrupt:
        _fail("stopped", code=130)


def _sizes(name: str, text: str) -> list[int]:
    """Return the numbers of a text such as 14x14."""
    try:
        return [int(size) for size in text.lower().split("x")]
    except ValueError:
        raise ValueError(f"{name} must be a size such as 14 or 14x14, got {text!r}") from None


def _fail(error: Exception | str, code: int = 2) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `fasthyper`."""
    top = parser()
    options = vars(top.parse_args(arguments))
    if not options:
        top.print_help(sys.stderr)
        raise SystemExit(2)
    try:
        options.pop("run")(**options)
    except BrokenPipeError:  # of `| head`; Python would report it again as it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
