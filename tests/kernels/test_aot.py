"""Every kernel with every tile that a part may take compiles for that part, clean, with no GPU at hand."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fasthyper.backends import triton
from fasthyper.backends.triton import aot
from fasthyper.backends.triton.tiles import PARTS

pytestmark = pytest.mark.skipif(triton.interpreting(), reason="interpreted kernels cannot be compiled")


def _kinds():
    for part in PARTS:
        for dtype, allow_tf32 in aot.PRECISIONS:
            if allow_tf32 and part.startswith("gfx"):
                continue  # the same as without
            for kind in aot.kinds():
                # Every tile of every list for one kind of sizes; sm_90, whose hot loops are the tightest, for more.
                often = kind in aot.CENTRAL if part == "sm_90" and dtype == torch.bfloat16 else kind == "even"
                name = f"{part}-{str(dtype).removeprefix('torch.')}{'-tf32' if allow_tf32 else ''}-{kind}"
                marks = () if often else pytest.mark.slow
                yield pytest.param(part, dtype, allow_tf32, kind, id=name.replace(", ", "-"), marks=marks)


# What is let pass, and why.
REASONS = {
    ("sm_80", torch.float16, "ones", "weight_grad"): "six bytes, before the loop, where there is one input feature",
}


@pytest.mark.parametrize(("part", "dtype", "allow_tf32", "kind"), list(_kinds()))
def test_every_tile_is_clean(part, dtype, allow_tf32, kind):
    cases = list(aot.cases(part, dtype, allow_tf32, kind))
    assert cases
    faults = {}
    for name, call, operand in cases:
        found = aot.report(call, part).faults(part, operand)
        known = any(key[:3] == (part, dtype, kind) and key[3] in name for key in REASONS)
        if found and not known:
            faults[name] = found
    assert not faults


def test_a_fault_is_seen():
    """A tile far too large spills, and one whose operands are of 32 bits in shared memory takes more than there is."""
    case = next(aot.cases("sm_80", torch.bfloat16, False, "even"))
    call = case.call
    wide = call._replace(constants={**call.constants, "BM": 512}, warps=4)
    assert any("spills" in fault for fault in aot.report(wide, "sm_80").faults("sm_80", "generated"))
    good = aot.report(call, "sm_80")
    assert good.faults("sm_80", "generated") == []
    assert good._replace(warnings=("C7515",)).faults("sm_80", "generated") == ["ptxas warns of C7515"]
    assert good._replace(products=0).faults("sm_80", "generated") == ["uses no matrix unit"]
    assert len(good._replace(shared=1 << 20).faults("sm_80", "generated")) == 1
    assert "through shared memory" in good.faults("sm_90", "generated")[0]


def test_a_call_is_compiled_as_it_is_launched():
    """Ones and Nones are constants of the signature, multiples of 16 are known."""
    case = next(aot.cases("sm_90", torch.bfloat16, False, "even"))
    source = aot.source(case.call)
    assert source.signature["a_ptr"] == "constexpr"
    assert source.signature["su_c"] == "constexpr"
    assert source.signature["u_ptr"] == "*bf16"
    assert source.signature["h"] == "tensordesc<bf16[128, 64]>"
    assert (source.fn.arg_names.index("M"),) in source.attrs  # 4800
