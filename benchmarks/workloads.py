"""Published problems to measure on: real shapes, from the public code named. B is scaled down where a run is long.

B instances, N points per instance, R features into the head, I → O the generated layer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """A problem and where it comes from.

    Attributes:
        name: what it is called in tables; one with several layers has a workload for each.
        B: instances, so many that a run on two cores takes a second at most.
        N: points per instance.
        R: features of z.
        I: in features of the generated layer.
        O: out features of the generated layer.
        source: the public code that has these sizes.
        published: B there, where it is another.
        readme: whether the README's short table shows it.
        large: whether it needs gigabytes, and is left out unless asked for.
        extra: whether it is a case of our own, left out of the means.
    """

    name: str
    B: int
    N: int
    R: int
    I: int
    O: int
    source: str
    published: int | None = None
    readme: bool = False
    large: bool = False
    extra: bool = False

    @property
    def label(self) -> str:
        """Name and layer."""
        return f"{self.name}, {self.I} → {self.O}"

    @property
    def flops(self) -> int:
        """Of forward + backward by the identity: three products of 2·B·N·R·I·O, since dx and dz share one."""
        return 3 * 2 * self.B * self.N * self.R * self.I * self.O

    @property
    def head(self) -> int:
        """Numbers in H."""
        return self.R * self.I * self.O


ROTATION, SYNTHETIC = "Galanti & Wolf 2020, rotation", "Galanti & Wolf 2020, synthetic experiment"
COLORIZATION = "Galanti & Wolf 2020, appendix"
MODELNET = "edge-conditioned MPNN benchmark on ModelNet"
SIREN = "SIREN's hypernetwork, neural-process images"
DEEPONET = "HyperDeepONet's target net"
CONDCONV = "CondConv EfficientNet-B0"

WORKLOADS = (
    Workload("synthetic depth", 200, 1, 100, 1000, 10, SYNTHETIC),
    Workload("synthetic depth", 200, 1, 100, 10, 1, SYNTHETIC),
    Workload("rotation mnist", 64, 1, 50, 784, 10, ROTATION),
    Workload("rotation mnist", 64, 1, 50, 10, 12, ROTATION),
    Workload("rotation cifar", 64, 1, 100, 3072, 10, ROTATION, readme=True),
    Workload("rotation cifar", 64, 1, 100, 10, 12, ROTATION),
    Workload("qm9 mpnn", 9_792, 1, 128, 64, 64, "PyG examples/qm9_nn_conv.py", published=39_168, readme=True),
    Workload("modelnet mpnn", 8_192, 1, 25, 64, 64, MODELNET),
    Workload("modelnet mpnn", 8_192, 1, 25, 64, 128, MODELNET, readme=True),
    Workload("diffdock-like", 10_000, 1, 144, 48, 48, "DiffDock's per-edge weights", published=50_000, readme=True),
    Workload("qmix mmm2", 5_760, 1, 64, 10, 32, "PyMARL qmix on MMM2"),
    Workload("qmix mmm2", 5_760, 1, 64, 32, 1, "PyMARL qmix on MMM2"),
    Workload("qmix 27m", 5_760, 1, 64, 27, 32, "PyMARL qmix on 27m_vs_30m", readme=True),
    Workload("hyper policy", 256, 1, 256, 17, 256, "Sarafian et al. 2021", readme=True),
    Workload("biaffine labels", 4_096, 1, 101, 101, 50, "deep biaffine parsers: torch.nn.Bilinear", readme=True),
    Workload("tiny batch", 32, 1, 64, 10, 32, "qmix mmm2 with few instances", extra=True),
    Workload("colorization", 64, 64, 100, 42, 10, COLORIZATION),
    Workload("colorization", 64, 64, 100, 10, 3, COLORIZATION),
    Workload("operator learning", 100, 100, 64, 20, 20, DEEPONET, readme=True),
    Workload("operator learning", 100, 100, 64, 20, 10, DEEPONET),
    Workload("siren images", 100, 1_024, 256, 2, 256, SIREN),
    Workload("siren images", 32, 1_024, 256, 256, 256, SIREN, published=100, readme=True),
    Workload("siren images", 100, 1_024, 256, 256, 3, SIREN),
    Workload("mothernet", 8, 58, 2_048, 512, 512, "MotherNet's generated MLP, full rank", large=True),
    Workload("text-to-lora A", 8, 512, 512, 4096, 8, "Text-to-LoRA on Mistral-7B, r = 8"),
    Workload("text-to-lora B", 8, 512, 512, 8, 4096, "Text-to-LoRA on Mistral-7B, r = 8"),
    Workload("condconv 1x1", 128, 49, 4, 192, 1152, CONDCONV),
    Workload("condconv 1x1", 128, 49, 8, 192, 1152, CONDCONV, readme=True),
)
