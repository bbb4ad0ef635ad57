"""The comparison of hypernetworks with the embedding method, from the command line or from here.

comparison = Comparison.of(ROTATION, "digits", depths="2-3", seeds=2)
summary = run_comparison(comparison, "results/rotation")
"""

from fasthyper.experiments.data import DatasetUnavailable
from fasthyper.experiments.experiment import Comparison, Experiment
from fasthyper.experiments.rotation import ROTATION
from fasthyper.experiments.runner import run_comparison
from fasthyper.experiments.summary import Summary

__all__ = ["ROTATION", "Comparison", "DatasetUnavailable", "Experiment", "Summary", "run_comparison"]
