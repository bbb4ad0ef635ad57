"""The comparison of hypernetworks with other ways to condition a network, from the command line or from here.

comparison = Comparison.of(ROTATION, "digits", depths="2-3", seeds=2)
summary = run_comparison(comparison, "results/rotation")
"""

from fasthyper.experiments.assumptions import ASSUMPTIONS
from fasthyper.experiments.claims import Exponent, FallsAtEachStep, Flat, Improves, Steeper, WellBelow, Wins
from fasthyper.experiments.colorization import COLORIZATION
from fasthyper.experiments.comparison import Comparison
from fasthyper.experiments.data import DatasetUnavailable
from fasthyper.experiments.distributed import WorkerFailed
from fasthyper.experiments.experiment import (
    Axis,
    Batch,
    Claim,
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
from fasthyper.experiments.operators import OPERATOR_LEARNING
from fasthyper.experiments.rotation import ROTATION
from fasthyper.experiments.runner import run_comparison
from fasthyper.experiments.scaling import SCALING
from fasthyper.experiments.summary import Summary
from fasthyper.experiments.synthetic import SYNTHETIC

EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (ROTATION, SYNTHETIC, COLORIZATION, OPERATOR_LEARNING, SCALING, ASSUMPTIONS)
}

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
