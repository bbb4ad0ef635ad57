"""Four processes save models in parts; two load them."""

from __future__ import annotations

import torch
import torch.distributed.checkpoint as dcp
from model_checks import PLANS, equal, model_of, plain
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module


def sharded(model):
    for layer in list(model.primary):
        fully_shard(layer)
    return fully_shard(model)


def in_parts(by):
    def divide(model):
        weight = next(model.primary.parameters())
        mesh = init_device_mesh(weight.device.type, (torch.distributed.get_world_size(),))
        return parallelize_module(model, mesh, PLANS[by][0])

    return divide


HOWS = {"sharded": sharded, "out": in_parts("out, in"), "cond": in_parts("cond")}


def check_saved_and_loaded(here):
    one = model_of(plain(), here)
    for saved_by, divide in HOWS.items():
        if here.size == 4:
            dcp.save(divide(model_of(plain(), here)).state_dict(), checkpoint_id=here.folder / saved_by)
        for divide_again in HOWS.values():
            model = divide_again(model_of(plain(), here))
            for parameter in model.parameters():
                torch.nn.init.zeros_(parameter)
            state = model.state_dict()
            dcp.load(state, checkpoint_id=here.folder / saved_by)
            model.load_state_dict(state)
            equal(model, one)
