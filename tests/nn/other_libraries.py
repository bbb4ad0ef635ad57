"""What the tests need to import other libraries."""

import contextlib

import torch


def define_ops_of_torchvision():
    """Define the ops that torchvision registers fakes for: a torchvision without its binaries then imports."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            with contextlib.suppress(RuntimeError):
                torch.library.define(
                    f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
