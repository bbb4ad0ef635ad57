"""What is done to models that share modules: copies, conversions, moves and files."""

import copy
import io
import pickle

import torch


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CHANGES = {
    "nothing": lambda net: net,
    "deepcopy": copy.deepcopy,
    "double": lambda net: net.double(),
    "to": lambda net: net.to(torch.float64),
    "to_empty": lambda net: net.to_empty(device="cpu"),
    "meta": lambda net: net.to("meta").to_empty(device="cpu"),
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "save": saved,
    "share_memory": lambda net: net.share_memory(),
    "ema": lambda net: torch.optim.swa_utils.AveragedModel(net).module,
}
