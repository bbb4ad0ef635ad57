"""Apply weights that are generated per instance, and train their generators, without ever writing the weights out."""

from . import nn as nn
from . import ops as ops
from ._version import __version__ as __version__
from .adapters import low_rank_linear
from .backends import set_backend, use_backend
from .functional import hyper_linear
from .functional_conv import (
    hyper_conv1d,
    hyper_conv2d,
    hyper_conv3d,
    hyper_conv_transpose1d,
    hyper_conv_transpose2d,
    hyper_conv_transpose3d,
)
from .incidence import Incidence
from .nn import (
    Bilinear,
    EmbeddingNetwork,
    HyperLinear,
    Hypernetwork,
    PairwiseBilinear,
    deliver,
    hyperize,
    parameter_report,
)
from .planner import get_workspace_limit, set_workspace_limit

ops.sharding.prepare()  # compiled code cannot do it at its first call

# Not nn, ops and __version__: after `from fasthyper import *` these names are still those of its user.
__all__ = [
    "Bilinear",
    "EmbeddingNetwork",
    "HyperLinear",
    "Hypernetwork",
    "Incidence",
    "PairwiseBilinear",
    "deliver",
    "get_workspace_limit",
    "hyper_conv1d",
    "hyper_conv2d",
    "hyper_conv3d",
    "hyper_conv_transpose1d",
    "hyper_conv_transpose2d",
    "hyper_conv_transpose3d",
    "hyper_linear",
    "hyperize",
    "low_rank_linear",
    "parameter_report",
    "set_backend",
    "set_workspace_limit",
    "use_backend",
]
