"""Layers: generated linear layers, hypernetworks built from them, and the embedding method as a baseline."""

from fasthyper.nn.affine import HyperAffine
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
from fasthyper.nn.current_z import deliver
from fasthyper.nn.embedding import EmbeddingNetwork
from fasthyper.nn.hyper_embedding import HyperEmbedding
from fasthyper.nn.hyperize import hyperize, ungenerated
from fasthyper.nn.hypernetwork import Hypernetwork
from fasthyper.nn.init import bias_hyper_, hyperfan_in_, hyperfan_out_
from fasthyper.nn.linear import HyperLinear
from fasthyper.nn.nn_conv import NNConv
from fasthyper.nn.opacus_samplers import register_with_opacus
from fasthyper.nn.pairwise_bilinear import PairwiseBilinear
from fasthyper.nn.parameters import ParameterReport, parameter_report
from fasthyper.nn.per_sample import per_sample_norm_sq
from fasthyper.nn.qmixer import QMixer
from fasthyper.nn.rgcn_conv import RGCNConv
from fasthyper.nn.summary import GenerationSummary, LayerSummary, what_is_generated

__all__ = [
    "Bilinear",
    "CondConv2d",
    "EmbeddingNetwork",
    "GenerationSummary",
    "HyperAffine",
    "HyperConv1d",
    "HyperConv2d",
    "HyperConv3d",
    "HyperConvTranspose1d",
    "HyperConvTranspose2d",
    "HyperConvTranspose3d",
    "HyperEmbedding",
    "HyperLinear",
    "Hypernetwork",
    "LayerSummary",
    "NNConv",
    "PairwiseBilinear",
    "ParameterReport",
    "QMixer",
    "RGCNConv",
    "bias_hyper_",
    "deliver",
    "hyperfan_in_",
    "hyperfan_out_",
    "hyperize",
    "parameter_report",
    "per_sample_norm_sq",
    "register_with_opacus",
    "ungenerated",
    "what_is_generated",
]
