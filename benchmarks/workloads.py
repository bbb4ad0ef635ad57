"""The problems to measure: layers of published networks, and axes along which one size grows.

B instances, N points per instance, R features of z, a generated layer of I → O features. On a CPU, B is smaller than
published where a run on two cores would be long. Graphs, ragged points and pairs have B terms, which share S rows of x,
C rows of z and T rows of y. A convolution has N pixels of its output as points, and I and O channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from .records import layers


@dataclass(frozen=True)
class Workload:
    """The sizes of a problem and their source.

    Attributes:
        name: in tables; a network with several layers has one workload per layer.
        B: instances, chosen so that a run on two cores takes at most half a second.
        N: points per instance.
        R: features of z.
        I: in features of the generated layer.
        O: out features of the generated layer.
        source: the public code that has these sizes.
        S: rows of x that the terms share; 0 if each term has its own.
        C: the same for z.
        T: rows of y, each a sum of terms; 0 if each term has its own.
        draw: how the indices of the terms are drawn, a key of `terms.DRAWS`; empty if there are none.
        hidden: units between two generated layers, I → hidden → O, with a ReLU. 0 for a single layer.
        rank: the same between the two factors of a weight of low rank, without a ReLU.
        kernel: taps of a convolution along each side of its image, an odd number; half of them is the padding. 0 for
            a linear layer.
        stride: of a convolution.
        groups: of a convolution.
        weight_map: φ, the function of the generated weights, a key of `mapped_ways.MAPS`; empty if there is none.
        published: B in the public code, if it differs.
        readme: whether the README's table shows it and a CPU measures it in more than one mode and dtype.
        large: whether it needs gigabytes or minutes on a CPU, which then measures it only with `--large`.
        extra: whether its sizes are not published; means leave it out.
    """

    name: str
    B: int
    N: int
    R: int
    I: int
    O: int
    source: str
    S: int = 0
    C: int = 0
    T: int = 0
    draw: str = ""
    hidden: int = 0
    rank: int = 0
    kernel: int = 0
    stride: int = 1
    groups: int = 1
    weight_map: str = ""
    published: int | None = None
    readme: bool = False
    large: bool = False
    extra: bool = False

    @property
    def label(self) -> str:
        """The name and the features of each layer."""
        return f"{self.name}, {self.layers}"

    @property
    def layers(self) -> str:
        """The features of each layer, such as `64 → 128`, and φ."""
        return layers(self)

    @property
    def form(self) -> str:
        """What the instances share, which decides on the ways that compute it.

        `"layer"`: nothing; `"primary"`: nothing, two layers; `"low rank"`: nothing, two factors; `"convolution"`:
        nothing, with images for x; `"mapped"`: nothing, with a function of W; `"graph"`: x and y; `"relations"`: x, z
        and y; `"ragged"`: z; `"pairs"`: x and z.
        """
        if self.kernel:
            return "convolution"
        if self.weight_map:
            return "mapped"
        if self.hidden or self.rank:
            return "primary" if self.hidden else "low rank"
        if self.T:
            return "relations" if self.C else "graph"
        return "pairs" if self.S else "ragged" if self.C else "layer"

    @property
    def side(self) -> int:
        """The pixels along each side of a convolution's image, which is a square."""
        return self.stride * math.isqrt(self.N)

    def as_published(self) -> Workload:
        """Return the workload with as many instances as in the public code."""
        return dataclasses.replace(self, B=self.published or self.B, published=None)


ROTATION, SYNTHETIC = "Galanti & Wolf 2020, rotation", "Galanti & Wolf 2020, synthetic experiment"
COLORIZATION = "Galanti & Wolf 2020, appendix"
QM9 = "PyG examples/qm9_nn_conv.py"
MODELNET = "edge-conditioned MPNN benchmark on ModelNet"
DIFFDOCK = "DiffDock's per-edge weights, one path"
BIAFFINE = "deep biaffine parsers: torch.nn.Bilinear"
QMIX = "PyMARL qmix on MMM2"
SIGNED = "sizes of PyMARL's qmix on MMM2; without its absolute values, and with ReLU for ELU"
SIREN = "SIREN's hypernetwork, neural-process images"
DEEPONET = "HyperDeepONet's target net"
LORA = "Text-to-LoRA on Mistral-7B, r = 8"
CONDCONV = "CondConv EfficientNet-B0"
SAMPLED = "neighbour sampling: 15 edges into each of 1,000 nodes"
POWER = "node t has edges in proportion to t^-0.7"
PAIRS = "stanza's PairwiseBilinear: labels of a dependency parser"
RGCN = "PyG examples/rgcn.py: 30 bases"
RAGGED = "PyG Batch: weights for each graph"
D2L = "Doc-to-LoRA on Gemma-2-2B, r = 8"
TIMM = "timm's efficientnet_cc_b0_4e, images of 224 × 224"
ODCONV = "ODConv: four kernels in a ResNet's third stage"
SMALL_NET = "a layer of a small network that is generated as a whole"

WORKLOADS = (
    Workload("synthetic depth", 200, 1, 100, 1000, 10, SYNTHETIC),
    Workload("synthetic depth", 200, 1, 100, 10, 1, SYNTHETIC),
    Workload("rotation mnist", 64, 1, 50, 784, 10, ROTATION),
    Workload("rotation mnist", 64, 1, 50, 10, 12, ROTATION),
    Workload("rotation cifar", 64, 1, 100, 3072, 10, ROTATION, readme=True),
    Workload("rotation cifar", 64, 1, 100, 10, 12, ROTATION),
    Workload("qm9 mpnn", 4_896, 1, 128, 64, 64, QM9, published=39_168, readme=True),
    Workload("modelnet mpnn", 4_096, 1, 25, 64, 64, MODELNET, published=8_192),
    Workload("modelnet mpnn", 4_096, 1, 25, 64, 128, MODELNET, published=8_192, readme=True),
    Workload("diffdock-like", 2_500, 1, 144, 48, 48, DIFFDOCK, published=50_000, readme=True),
    Workload("qmix mixer mmm2", 5_760, 1, 64, 10, 32, QMIX, weight_map="abs"),
    Workload("qmix mixer mmm2", 5_760, 1, 64, 32, 1, QMIX, weight_map="abs"),
    Workload("qmix mixer 27m", 5_760, 1, 64, 27, 32, "PyMARL qmix on 27m_vs_30m", weight_map="abs", readme=True),
    Workload("hyper policy", 256, 1, 256, 17, 256, "Sarafian et al. 2021", readme=True),
    Workload("biaffine labels", 1_024, 1, 101, 101, 50, BIAFFINE, published=4_096, readme=True),
    Workload("tiny batch", 32, 1, 64, 10, 32, "few instances of a small layer", extra=True),
    Workload("square", 16_384, 1, 128, 128, 128, "no published layer with O ≥ 128 is as large", large=True, extra=True),
    Workload("colorization", 64, 64, 100, 42, 10, COLORIZATION),
    Workload("colorization", 64, 64, 100, 10, 3, COLORIZATION),
    Workload("operator learning", 100, 100, 64, 20, 20, DEEPONET, readme=True),
    Workload("operator learning", 100, 100, 64, 20, 10, DEEPONET),
    Workload("siren images", 32, 1_024, 256, 2, 256, SIREN, published=100),
    Workload("siren images", 8, 1_024, 256, 256, 256, SIREN, published=100, readme=True),
    Workload("siren images", 32, 1_024, 256, 256, 3, SIREN, published=100),
    Workload("mothernet", 8, 58, 2_048, 512, 512, "MotherNet's generated MLP, full rank", large=True),
    Workload("text-to-lora A", 8, 512, 512, 4096, 8, LORA),
    Workload("text-to-lora B", 8, 512, 512, 8, 4096, LORA),
    Workload("condconv 1x1", 64, 49, 4, 192, 1152, CONDCONV, published=128),
    Workload("condconv 1x1", 64, 49, 8, 192, 1152, CONDCONV, published=128, readme=True),
    # Graphs: B edges in random order between S source nodes and T target nodes.
    Workload("qm9 graph", 9_792, 1, 128, 64, 64, QM9, S=576, T=576, draw="uniform", readme=True),
    Workload("complete graph", 9_792, 1, 128, 64, 64, QM9, S=576, T=576, draw="complete graphs"),
    Workload("modelnet graph", 8_192, 1, 25, 64, 64, MODELNET, S=1_024, T=1_024, draw="uniform"),
    Workload("sampled graph", 15_360, 1, 128, 64, 64, SAMPLED, S=6_000, T=1_000, draw="uniform"),
    Workload("sparse graph", 6_000, 1, 64, 32, 32, "two edges a node", S=6_000, T=3_000, draw="uniform"),
    Workload("power law graph", 9_000, 1, 64, 32, 64, POWER, S=2_000, T=2_000, draw="power law", readme=True),
    Workload("relation graph", 20_000, 1, 30, 64, 64, RGCN, S=4_000, C=50, T=4_000, draw="uniform", readme=True),
    # Ragged points: B nodes or tokens, of C graphs or documents.
    Workload("ragged nodes", 2_240, 1, 128, 64, 64, RAGGED, C=128, draw="5 to 30 each", readme=True),
    Workload("ragged nodes", 6_400, 1, 64, 32, 32, RAGGED, C=32, draw="100 to 300 each"),
    Workload("ragged tokens A", 8_192, 1, 512, 2304, 8, D2L, C=8, draw="128 to 2048 each"),
    Workload("ragged tokens B", 8_192, 1, 512, 8, 2304, D2L, C=8, draw="128 to 2048 each"),
    # Pairs: all 64 × 64 pairs of tokens of 32 sentences.
    Workload("biaffine pairs", 131_072, 1, 401, 401, 50, PAIRS, S=2_048, C=2_048, draw="all pairs", readme=True),
    # Convolutions: N pixels of the output.
    Workload("efficientnet pointwise", 32, 196, 4, 80, 480, TIMM, kernel=1),
    Workload("efficientnet pointwise", 32, 196, 4, 480, 112, TIMM, kernel=1),
    Workload("efficientnet pointwise", 32, 196, 4, 112, 672, TIMM, kernel=1),
    Workload("efficientnet pointwise", 32, 196, 4, 672, 112, TIMM, kernel=1),
    Workload("efficientnet pointwise", 32, 49, 4, 672, 192, TIMM, kernel=1),
    Workload("efficientnet pointwise", 32, 49, 4, 192, 1152, TIMM, kernel=1, readme=True),
    Workload("efficientnet pointwise", 32, 49, 4, 1152, 192, TIMM, kernel=1),
    Workload("efficientnet pointwise", 32, 49, 4, 1152, 320, TIMM, kernel=1),
    Workload("efficientnet depthwise 5x5", 32, 196, 4, 480, 480, TIMM, kernel=5, groups=480),
    Workload("efficientnet depthwise 5x5", 32, 196, 4, 672, 672, TIMM, kernel=5, groups=672, readme=True),
    Workload("efficientnet depthwise 5x5 by 2", 32, 49, 4, 672, 672, TIMM, kernel=5, stride=2, groups=672),
    Workload("efficientnet depthwise 5x5", 32, 49, 4, 1152, 1152, TIMM, kernel=5, groups=1152),
    Workload("efficientnet depthwise 3x3", 32, 49, 4, 1152, 1152, TIMM, kernel=3, groups=1152),
    Workload("odconv 3x3", 64, 196, 4, 256, 256, ODCONV, kernel=3, readme=True),
    Workload("small nets 3x3", 64, 784, 64, 16, 32, SMALL_NET, kernel=3, readme=True),
    # Two generated factors: W has rank 8.
    Workload("text-to-lora A and B", 8, 512, 512, 4096, 4096, LORA, rank=8),
    # Whole primary networks, with biases and shared weights.
    Workload("rotation mnist primary", 64, 1, 50, 784, 12, ROTATION, hidden=10),
    Workload("rotation cifar primary", 64, 1, 100, 3072, 12, ROTATION, hidden=10),
    Workload("qmix mmm2 primary", 5_760, 1, 64, 10, 1, SIGNED, hidden=32),
)


@dataclass(frozen=True)
class Axis:
    """A size that grows while the others stay fixed.

    Attributes:
        name: `"B"`, `"N"`, `"R"` or `"width"`, which is I = O.
        sizes: B, N, R, I, O; 0 for the size that grows.
        values: of the size that grows.
        more: further values on a GPU.
    """

    name: str
    sizes: tuple[int, int, int, int, int]
    values: tuple[int, ...]
    more: tuple[int, ...] = ()

    def workloads(self, device: str = "cpu") -> Iterator[Workload]:
        """Yield a workload for each value."""
        for value in self.values + (self.more if device != "cpu" else ()):
            grown = {"I": value, "O": value} if self.name == "width" else {self.name: value}
            sizes = dict(zip("BNRIO", self.sizes, strict=True))
            yield Workload(f"over {self.name}", **{**sizes, **grown}, source="scaling")


AXES = (
    # Up to sizes at which W and its gradient, 512 KiB per instance, fill the memory of a machine.
    Axis("B", (0, 1, 2, 256, 256), (4, 32, 256, 2_048, 16_384, 131_072), (1_048_576,)),
    Axis("N", (64, 0, 64, 64, 64), (1, 2, 4, 8, 16, 64, 256, 1_024), (4_096,)),
    Axis("R", (1_024, 1, 0, 64, 64), (2, 8, 32, 128, 512), (2_048,)),
    Axis("width", (512, 1, 32, 0, 0), (4, 16, 64, 128, 256, 512), (1_024,)),
)
