"""The experiments, one module each, and the table of them by name.

A module of the catalogue has, with the types of `fasthyper.experiments.experiment`:

    a subclass of `Setting`        the numbers that decide a run, except the method and the seed
    `architecture(run)`            the sizes of the networks, the same for all methods
    `task(run, dataset)`           training and test examples, the loss, and the measures on the test examples
    `studies(preset, data)`        the figures, each with an axis, its values, the methods and the claims
    `load(data, data_home)`        the data set, if there is one to load
    an `Experiment`                all of these, with its name, its source, its question and the choices made here

Training, statistics and reports are in `fasthyper.experiments` and the same for all experiments. To add an experiment,
write such a module and add its `Experiment` to the table below. An experiment outside of this package needs no entry:
pass it to `fasthyper.experiments.Comparison.of`.
"""

from fasthyper.experiments.catalogue.assumptions import ASSUMPTIONS
from fasthyper.experiments.catalogue.colorization import COLORIZATION
from fasthyper.experiments.catalogue.equations import EQUATION_LEARNING
from fasthyper.experiments.catalogue.infinite_width import INFINITE_WIDTH
from fasthyper.experiments.catalogue.initialisation import INITIALISATION
from fasthyper.experiments.catalogue.modularity import MODULARITY
from fasthyper.experiments.catalogue.operators import OPERATOR_LEARNING
from fasthyper.experiments.catalogue.rotation import ROTATION
from fasthyper.experiments.catalogue.scaling import SCALING
from fasthyper.experiments.catalogue.synthetic import SYNTHETIC
from fasthyper.experiments.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        ROTATION,
        SYNTHETIC,
        COLORIZATION,
        OPERATOR_LEARNING,
        SCALING,
        ASSUMPTIONS,
        MODULARITY,
        EQUATION_LEARNING,
        INITIALISATION,
        INFINITE_WIDTH,
    )
}
"""The experiments by name, in the order in which `fasthyper compare all` runs them."""
