"""Several processes compute what one does."""

from __future__ import annotations

import pytest
import torch
from processes import BACKENDS, Here, run

from fasthyper.ops.register import DEFINED
from fasthyper.ops.sharding import LETTERS


def test_every_op_has_its_letters():
    assert {*LETTERS} == {*DEFINED}
    for name, letters in LETTERS.items():
        signature = DEFINED[name].signature
        assert {*letters} <= {letter for field in signature.tensors for letter in signature.axes[field]}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ops_on_parts_of_tensors(backend, tmp_path):
    run("op_checks", 4, backend, tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 4])
def test_models(size, backend, tmp_path):
    run("model_checks", size, backend, tmp_path)


def test_checkpoints_of_four_processes_are_loaded_by_two_and_by_one(tmp_path):
    run("checkpoint_checks", 4, "gloo", tmp_path)
    run("checkpoint_checks", 2, "gloo", tmp_path)
    import torch.distributed.checkpoint as dcp
    from checkpoint_checks import HOWS, model_of, plain

    here = Here(0, 1, "cpu", tmp_path)
    for saved_by in HOWS:
        model = model_of(plain(), here)
        state = {name: torch.zeros_like(t) for name, t in model.state_dict().items()}
        dcp.load(state, checkpoint_id=tmp_path / saved_by, no_dist=True)
        torch.testing.assert_close(state, dict(model.state_dict()))
