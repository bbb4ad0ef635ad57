"""Layers: generated linear layers, hypernetworks built from them, and the embedding method as a baseline."""

from fasthyper.nn.bilinear import Bilinear
from fasthyper.nn.cond_conv import CondConv2d
from fasthyper.nn.conv import (
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperConvTranspose1d,
    HyperConvTranspose2d,
    HyperConvTranspose3d,
)
from fasthyper.nn.embedding import EmbeddingNetwork
from fasthyper.nn.hyperize import hyperize, ungenerated
from fasthyper.nn.hypernetwork import Hypernetwork
from fasthyper.nn.init import bias_hyper_, hyperfan_in_, hyperfan_out_
from fasthyper.nn.linear import HyperLinear
from fasthyper.nn.nn_conv import NNConv
from fasthyper.nn.pairwise_bilinear import PairwiseBilinear
from fasthyper.nn.parameters import ParameterReport, parameter_report
from fasthyper.nn.rgcn_conv import RGCNConv

__all__ = [
    "Bilinear",
    "CondConv2d",
    "EmbeddingNetwork",
    "HyperConv1d",
    "HyperConv2d",
    "HyperConv3d",
    "HyperConvTranspose1d",
    "HyperConvTranspose2d",
    "HyperConvTranspose3d",
    "HyperLinear",
    "Hypernetwork",
    "NNConv",
    "PairwiseBilinear",
    "ParameterReport",
    "RGCNConv",
    "bias_hyper_",
    "hyperfan_in_",
    "hyperfan_out_",
    "hyperize",
    "parameter_report",
    "ungenerated",
]
