"""Several processes compute what one does."""

from __future__ import annotations

import pytest
from processes import BACKENDS, run

from fasthyper.ops.register import SIGNATURES
from fasthyper.ops.sharding import LETTERS


def test_every_op_has_its_letters():
    assert {*LETTERS} == {*SIGNATURES}
    for name, letters in LETTERS.items():
        signature = SIGNATURES[name]
        assert {*letters} <= {letter for field in signature.tensors for letter in signature.axes[field]}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ops_on_parts_of_tensors(backend, tmp_path):
    run("op_checks", 4, backend, tmp_path)
