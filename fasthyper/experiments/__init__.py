"""Compare hypernetworks with other ways to condition a network, from Python or by `fasthyper compare`.

    comparison = Comparison.of(ROTATION, "digits", depths="2-3", seeds=2)
    summary = run_comparison(comparison, "results/rotation")

The modules, in the order in which they build on each other:

    networks       the networks that the methods build
    wide           a hypernetwork in the parametrisation of infinite width
    methods        the methods that are compared, and their sizes
    setting        the settings of runs
    experiment     the types that declare an experiment: start here to write one
    rates          the learning rates that were chosen
    significance   tests of significance and their power
    results        the statistics of one study
    comparison     chosen studies of an experiment, and the runs that they need
    tuning         the choice of learning rates
    training       one run
    side_by_side   runs that differ only in their seed, trained as one
    words          these statistics in words
    claims         the claims about a study, each with its test
    verdicts       the verdicts on all claims of a page
    catalogue      the experiments, and the table of them by name
    summary        the results and findings of a comparison
    drawing, figures                   the figure of a study
    standing, outcome                  which methods could be the best, and the outcome in words
    report                             the summary as CSV and as one HTML page
    structures                         the frontiers of several comparisons
    answer                             one page for several comparisons, and its lines in the README
    files, store, distributed, runner  all runs of a comparison, in several processes, and the file of finished runs
    record                             writes the tuning runs that the package comes with
"""

from fasthyper.experiments.catalogue import EXPERIMENTS
from fasthyper.experiments.catalogue.frontiers import frontier
from fasthyper.experiments.catalogue.rotation import ROTATION
from fasthyper.experiments.claims import Exponent, FallsAtEachStep, Flat, Improves, Learns, Steeper, WellBelow, Wins
from fasthyper.experiments.comparison import Comparison
from fasthyper.experiments.distributed import WorkerFailed
from fasthyper.experiments.experiment import (
    Axis,
    Batch,
    Claim,
    DatasetUnavailable,
    Examples,
    Experiment,
    Finding,
    Line,
    Measure,
    Run,
    Study,
    Task,
    Tuning,
)
from fasthyper.experiments.methods import ALL, EQUAL_TOTAL, METHODS, Architecture
from fasthyper.experiments.rates import Rate
from fasthyper.experiments.runner import run_comparison
from fasthyper.experiments.setting import Setting
from fasthyper.experiments.summary import Summary
from fasthyper.experiments.verdicts import judged

__all__ = [
    "ALL",
    "EQUAL_TOTAL",
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
    "Finding",
    "Flat",
    "Improves",
    "Learns",
    "Line",
    "Measure",
    "Rate",
    "Run",
    "Setting",
    "Steeper",
    "Study",
    "Summary",
    "Task",
    "Tuning",
    "WellBelow",
    "Wins",
    "WorkerFailed",
    "frontier",
    "judged",
    "run_comparison",
]
