"""The ops of generated convolutions: errors that name the argument."""

from __future__ import annotations

import pytest
import torch
from convolutions import GEOMETRIES, ops, tensors

import fasthyper

WRONG = {
    "x without channels": ({"x": torch.randn(5, 4, 4)}, r"x must have shape \(B, X, h, w\), got \(5, 4, 4\)"),
    "other batch": ({"z": torch.randn(4, 3)}, r"z must have B = 5"),
    "other features": ({"z": torch.randn(5, 2)}, r"z must have shape \(5, 3\)"),
    "channels": ({"x": torch.randn(5, 3, 4, 4)}, "x must have groups · I = "),
    "groups": ({"groups": 3}, "x must have groups · I = "),
    "no groups": ({"groups": 0}, "groups must be at least 1"),
    "stride": ({"stride": 0}, "stride must be at least 1"),
    "strides": ({"stride": (1, 1, 1)}, "stride must be an integer or 2 of them"),
    "padding": ({"padding": -1}, "padding must be at least 0"),
    "padding by name": ({"padding": "full"}, "padding must be numbers, 'same' or 'valid'"),
    "same with stride": ({"padding": "same", "stride": 2}, "stride must be 1 with padding='same'"),
    "small image": ({"x": torch.randn(5, 4, 1, 4)}, "the kernel fits into"),
    "bias": ({"bias": torch.randn(3, 3)}, r"bias must have (O = 4|shape \(4, 3\))"),
    "base weight": ({"base_weight": torch.randn(4, 2, 3, 3)}, "base_weight must have"),
    "device": ({"z": torch.randn(5, 3, device="meta")}, "z must be on the device of x"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument(case):
    change, message = WRONG[case]
    of = {"x": torch.randn(5, 4, 4, 4), "z": torch.randn(5, 3), "weight": torch.randn(4, 4, 3, 3, 3), **change}
    with pytest.raises(ValueError, match=message):
        fasthyper.hyper_conv2d(**of)


def test_wrong_types():
    x, z, weight = torch.randn(5, 4, 4, 4), torch.randn(5, 3), torch.randn(4, 4, 3, 3, 3)
    with pytest.raises(TypeError, match="z must have the dtype of x"):
        fasthyper.hyper_conv2d(x, z.double(), weight)
    with pytest.raises(TypeError, match="stride must be an integer"):
        fasthyper.hyper_conv2d(x, z, weight, stride=1.5)
    with pytest.raises(TypeError, match="weight must be a tensor"):
        fasthyper.hyper_conv2d(x, z, None)
    with pytest.raises(ValueError, match="output_padding must be smaller"):
        fasthyper.hyper_conv_transpose2d(x, z, weight, output_padding=1)


def test_wrong_geometry_of_the_op():
    geo = GEOMETRIES["odd"]
    *args, _ = tensors(geo, False)
    for change, message in (
        ({"output": [1, 9, 9]}, "output must be at most"),
        ({"image": [1, 7, 7]}, "image must be"),
        ({"stride": [1, 2]}, "stride must have three numbers"),
        ({"groups": 2}, "channels"),
        ({"dilation": [1, 0, 1]}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.hyper_conv(*args, *geo._replace(**change))
