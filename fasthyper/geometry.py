"""The geometry of a convolution: which pixels of the image and of the output a tap of the kernel connects.

    image pixel = output pixel · stride − padding + tap · dilation        on each spatial axis

A convolution maps the image to the output, a transposed one the output to the image. The ops have three spatial axes;
those that a call lacks have size 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

AXES = 3


class Geometry(NamedTuple):
    """Sizes, strides, paddings and dilations on each spatial axis, and the number of groups of channels."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    image: Sequence[int]
    kernel: Sequence[int]
    output: Sequence[int]

    @property
    def taps(self) -> int:
        """Taps of the kernel."""
        return math.prod(self.kernel)

    @property
    def pixels(self) -> tuple[int, int]:
        """Pixels of the image, and of the output."""
        return math.prod(self.image), math.prod(self.output)

    @property
    def pointwise(self) -> bool:
        """Whether each output pixel meets one image pixel, its own."""
        steps = [*self.stride, *(p + 1 for p in self.padding)]
        return self.taps == 1 and all(step == 1 for step in steps) and [*self.image] == [*self.output]

    @property
    def dims(self) -> int:
        """How many spatial axes torch's convolution needs: 2, or 3 if the first axis is in use."""
        first = self.image[0], self.kernel[0], self.output[0], self.stride[0]
        return 2 if first == (1, 1, 1, 1) and self.padding[0] == 0 else AXES

    def full(self) -> list[int]:
        """Return the output that torch's convolution gives, which may have more pixels than the output."""
        return [
            output_size(n, k, s, p, d)
            for n, k, s, p, d in zip(self.image, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        ]

    def unreached(self) -> list[int]:
        """Return, for each axis, the last pixels of the image that the kernel does not reach from any output pixel."""
        return [
            n - image_size(m, k, s, p, d)
            for n, m, k, s, p, d in zip(
                self.image, self.output, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]


def output_size(image: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return the size of a convolution's output along an axis; less than 1 if the kernel is larger than the image."""
    return (image + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def image_size(output: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return the size of a transposed convolution's result along an axis, without output padding."""
    return (output - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
