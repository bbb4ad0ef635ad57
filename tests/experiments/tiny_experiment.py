"""An experiment with runs of milliseconds, for tests in this process and in others.

Run it by `python -m tiny_experiment OUT`, or through the command line by `python -m tiny_experiment compare tiny`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fasthyper import cli
from fasthyper.experiments import EXPERIMENTS, Comparison, run_comparison
from fasthyper.experiments.claims import Flat, Improves, Wins
from fasthyper.experiments.experiment import ASKED, Axis, Examples, Experiment, Measure, Study, Task, Tuning
from fasthyper.experiments.methods import EMBEDDING, EQUAL_FLOPS, HYPERNETWORK, Architecture
from fasthyper.experiments.setting import Setting
from fasthyper.experiments.store import config_key

BOTH = (HYPERNETWORK, EMBEDDING)
TRAIN, TEST, VALIDATION = 40, 10, 20


@dataclass(frozen=True, kw_only=True)
class TinySetting(Setting):
    depth: int = 2
    width: int = 6
    embedding: int = 4
    offset: float = 0.0


SETTING = TinySetting(epochs=2, lr=0.05, batch_size=16)


def studies(preset, data):
    error = Measure("error", "squared error", log=True)
    seeds = 2 if preset == "quick" else 9
    return (
        Study(
            name="depth",
            title="Over depth",
            axis=Axis("depth", "layers"),
            values=(2, 3),
            methods=(*BOTH, EQUAL_FLOPS),
            setting=SETTING,
            seeds=seeds,
            measure=error,
            levels=(("zero", "answering zero"),),
            claims=(Wins(text="It wins"), Improves(text="It improves"), Flat(text="It stays", whose=ASKED)),
        ),
        Study(
            name="embedding",
            title="Over the embedding",
            axis=Axis("embedding", "E", log=True),
            values=(2, 4, 8),
            methods=BOTH,
            setting=SETTING,
            seeds=seeds,
            measure=error,
        ),
    )


def architecture(run):
    setting = run.setting
    context = (setting.width,) * (setting.depth - 1)
    return Architecture(cond=3, x=2, out=1, context=context, hidden=(5,), embedding=setting.embedding)


def tensors(first, count, offset):
    """Return x, I and sin(I · x) of `count` examples from number `first` on."""
    x, cond = torch.rand(1000, 5, generator=torch.Generator().manual_seed(3))[first : first + count].split([2, 3], 1)
    return x, cond, ((x * cond[:, :2]).sum(1, keepdim=True) + cond[:, 2:]).sin() + offset


BEGUN = Counter()
"""Counts the runs of each split that this process begins."""


def failing(error):
    def fail():
        raise error

    return fail


FAULTS = {
    "ValueError": failing(ValueError("two\n  lines")),
    "RuntimeError": failing(RuntimeError("no more")),
    "MemoryError": failing(MemoryError()),
    "exit": lambda: os._exit(3),
    **{name: lambda name=name: os.kill(os.getpid(), signal.Signals[name]) for name in ("SIGKILL", "SIGSEGV")},
    "SIGABRT": os.abort,
}
"""Faults by name. TINY_FAULT names the one that happens in the run of the embedding method and seed 1."""


def task(run, source):
    if path := os.environ.get("TINY_LOG"):
        with open(path, "a") as file:
            file.write(config_key(run.config()) + "\n")
    BEGUN[run.split] += 1
    if f"{run.split} {BEGUN[run.split]}" == os.environ.get("TINY_HELD"):
        time.sleep(15)  # gives a test the time to kill this process before its last run
    if (run.method, run.seed) == (EMBEDDING, 1) and (fault := os.environ.get("TINY_FAULT")):
        time.sleep(1)  # by now the other processes are done and wait for this one
        FAULTS[fault]()
    train, test, validation = (
        Examples.of(*tensors(first, count, run.setting.offset))
        for first, count in ((0, TRAIN), (500, TEST), (700, VALIDATION))
    )

    def measure(y, target):
        return {"error": (y - target).square().mean(1), "apart": (y - target).abs().mean(1)}

    return Task(train, test, torch.nn.functional.mse_loss, measure, levels={"zero": 0.7}, validation=validation)


TINY = Experiment(
    name="tiny",
    protocol=1,
    title="A tiny experiment",
    source="Nobody, Nowhere",
    question="Does the machinery work?",
    choices=("It is small.", "It is <quick> & dirty."),
    data=("line", "curve"),
    studies=studies,
    architecture=architecture,
    task=task,
)


TUNING = Tuning(rates={"sgd": (0.01, 0.1, 1e9), "adam": (0.001, 0.01)}, seeds=2)
"""With a rate at which every run diverges."""


def tuned_studies(preset, data):
    return tuple(replace(study, tuning=TUNING) for study in studies(preset, data))


TUNED = replace(TINY, studies=tuned_studies)


def comparison_of(seeds=2, depths="2-3", methods=BOTH, **options):
    return Comparison.of(TINY, depths=depths, methods=methods, seeds=seeds, device="cpu", **options)


def tuned_of(seeds=2, depths="2"):
    """Return a comparison that chooses learning rates: 12 runs for them, and two runs of results for each seed."""
    return Comparison.of(TUNED, depths=depths, methods=BOTH, seeds=seeds, device="cpu")


ALL_FILES = ["report.html", "runs.jsonl", "summary.csv"]


def files(folder):
    return sorted(os.listdir(folder))


def lines(out):
    return [json.loads(line) for line in (Path(out) / "runs.jsonl").read_text().splitlines()]


def numbers(records):
    """Return all metrics except times, by configuration. Fails if two records have the same one."""
    found = {
        config_key(record["config"]): {k: v for k, v in record["metrics"].items() if not k.endswith("seconds")}
        for record in records
    }
    assert len(found) == len(records)
    return found


def killed_over_and_over(comparison, out, kills):
    """Start the comparison in a fork and kill it after a random time, repeatedly; returns the number of kills."""
    chance = random.Random(0)
    killed = 0
    while killed < kills:
        child = os.fork()
        if child == 0:
            run_comparison(comparison, out, notify=print)
            os._exit(0)
        time.sleep(chance.uniform(0.01, 0.35))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            break
        killed += 1
    return killed


def main():
    if sys.argv[1] == "compare":
        EXPERIMENTS["tiny"] = TINY
        return cli.main()
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="+")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--kills", type=int, default=0)
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))[: int(os.environ.get("LOCAL_WORLD_SIZE", given.workers))]
        os.sched_setaffinity(0, allowed)  # one core, so one thread, for each process
    comparison = (tuned_of if given.tuned else comparison_of)(given.seeds)
    if given.kills:
        print(killed_over_and_over(comparison, given.out[0], given.kills))
        return
    for out in given.out:
        run_comparison(comparison, out, workers=given.workers)
        print(f"finished {out}", flush=True)


if __name__ == "__main__":
    main()
