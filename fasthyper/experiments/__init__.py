"""The comparison of hypernetworks with other ways to condition a network, from the command line or from here.

comparison = Comparison.of(ROTATION, "digits", depths="2-3", seeds=2)
summary = run_comparison(comparison, "results/rotation")
"""

from fasthyper.experiments.catalogue import EXPERIMENTS
from fasthyper.experiments.catalogue.rotation import ROTATION
from fasthyper.experiments.claims import Exponent, FallsAtEachStep, Flat, Improves, Steeper, WellBelow, Wins
from fasthyper.experiments.comparison import Comparison
from fasthyper.experiments.distributed import WorkerFailed
from fasthyper.experiments.experiment import (
    Axis,
    Batch,
    Claim,
    DatasetUnavailable,
    Examples,
    Experiment,
    Line,
    Measure,
    Run,
    Setting,
    Study,
    Task,
)
from fasthyper.experiments.methods import ALL, METHODS, Architecture
from fasthyper.experiments.runner import run_comparison
from fasthyper.experiments.summary import Summary

__all__ = [
    "ALL",
    "EXPERIMENTS",
    "METHODS",
    "ROTATION",
    "Architecture",
    "Axis",
    "Batch",
    "Claim",
    "Comparison",
    "DatasetUnavailable",
    "Examples",
    "Experiment",
    "Exponent",
    "FallsAtEachStep",
    "Flat",
    "Improves",
    "Line",
    "Measure",
    "Run",
    "Setting",
    "Steeper",
    "Study",
    "Summary",
    "Task",
    "WellBelow",
    "Wins",
    "WorkerFailed",
    "run_comparison",
]
