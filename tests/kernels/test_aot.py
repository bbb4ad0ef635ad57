"""Every Triton kernel compiles for every arch with each of its tiles, without spills or warnings. No GPU is needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fasthyper.backends import triton
from fasthyper.backends.triton import recording
from fasthyper.backends.triton.tiles import ARCHS
from fasthyper.problem import TERM_SCHEDULES
from fasthyper.terms import Terms

sys.path.append(str(Path(__file__).parent))
import aot
import hot_loops

pytestmark = pytest.mark.skipif(triton.interpreting(), reason="interpreted kernels cannot be compiled")


def _parameters():
    for arch in ARCHS:
        for dtype, allow_tf32 in aot.PRECISIONS:
            if allow_tf32 and arch.startswith("gfx"):
                continue  # the same as without
            for shape in aot.shape_names():
                # Every tile for one shape; more shapes on sm_90, which has the fewest registers to spare.
                fast = shape in aot.FAST_SHAPES if arch == "sm_90" and dtype == torch.bfloat16 else shape == "even"
                name = f"{arch}-{str(dtype).removeprefix('torch.')}{'-tf32' if allow_tf32 else ''}-{shape}"
                marks = () if fast else pytest.mark.slow
                yield pytest.param(arch, dtype, allow_tf32, shape, id=name.replace(", ", "-"), marks=marks)


# Faults that are accepted, and why.
ACCEPTED = {
    ("sm_80", torch.float16, "ones", "weight_grad"): "spills six bytes before the loop, for one input feature",
}


@pytest.mark.parametrize(("arch", "dtype", "allow_tf32", "shape"), list(_parameters()))
def test_every_tile_is_clean(arch, dtype, allow_tf32, shape):
    cases = list(aot.cases(arch, dtype, allow_tf32, shape))
    assert cases
    faults = {}
    for name, call, operand in cases:
        found = aot.resource_usage(call, arch).faults(arch, operand)
        accepted = any(key[:3] == (arch, dtype, shape) and key[3] in name for key in ACCEPTED)
        if found and not accepted:
            faults[name] = found
    assert not faults


def _term_parameters():
    for arch in ARCHS:
        for dtype, allow_tf32 in aot.PRECISIONS:
            if allow_tf32 and arch.startswith("gfx"):
                continue
            fast = arch == "sm_90" or (dtype != torch.float16 and not allow_tf32)
            # On gfx942, odd sizes spill scalar registers, into vector registers.
            others = () if arch.startswith("gfx") else ((101, 50), (25, 64), (256, 10))
            for sizes in ((64, 128), (16, 16), *others):
                marks = () if fast and sizes == (64, 128) else pytest.mark.slow
                yield pytest.param(arch, dtype, allow_tf32, sizes, marks=marks)


@pytest.mark.parametrize(("arch", "dtype", "allow_tf32", "sizes"), list(_term_parameters()), ids=str)
def test_kernels_over_terms_are_clean(arch, dtype, allow_tf32, sizes):
    cases = list(aot.term_cases(arch, dtype, allow_tf32, sizes))
    found = {name: aot.resource_usage(call, arch).faults(arch, operand) for name, call, operand in cases}
    assert not {name: faults for name, faults in found.items() if faults}


def _graph_parameters():
    for arch in ARCHS:
        for dtype in (torch.bfloat16, torch.float16):
            fast = arch == "sm_90" and dtype == torch.bfloat16
            for schedule in TERM_SCHEDULES:
                yield pytest.param(arch, dtype, schedule, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize(("arch", "dtype", "schedule"), list(_graph_parameters()), ids=str)
def test_all_launches_of_a_graph_in_16_bits_are_clean(arch, dtype, schedule, points, monkeypatch):
    """A forward and a backward over edges that are sorted by their source, as they are launched for an arch."""
    launched = {}

    def launch(call):
        source = aot.source(call)
        launched[call.kernel, str(source.signature), str(source.constants), str(source.attrs)] = call

    monkeypatch.setattr(recording.Call, "launch", launch)
    monkeypatch.setattr("fasthyper.backends.triton.launch.arch_of", lambda t: arch)
    E, S, R, I, O = 4000, 300, 128, 64, 64
    terms = Terms(torch.randint(S, (E,)).sort().values, None, torch.randint(S, (E,)), S, E, S)
    sizes = (S, points, I), (E, R), (O, I, R), (S, points, O)
    x, z, weight, g = (torch.zeros(size, dtype=dtype) for size in sizes)
    triton.apply_terms(x, z, weight, None, None, None, terms=terms, schedule=schedule)
    mask = (True,) * 3 + (False,) * 3
    triton.grads_terms(x, z, weight, None, None, g, mask, terms=terms, schedule=schedule)
    names = {call.kernel.__name__ for call in launched.values()}
    assert names >= ({"fold", "weight_grad"} if schedule == "fold" else {"outer_sum", "row_products"}) | {"sum_terms"}
    faults = {}
    for call in launched.values():
        operand = "stored" if call.constants.get("DOT", schedule == "fold" and "PRECISION" in call.constants) else ""
        if found := aot.resource_usage(call, arch).faults(arch, operand):
            faults[call.kernel.__name__, str(call.constants)] = found
    assert not faults


def test_a_fault_is_seen():
    """A tile that is far too large spills; each other fault is found in made-up numbers."""
    case = next(aot.cases("sm_80", torch.bfloat16, False, "even"))
    call = case.call
    wide = call._replace(constants={**call.constants, "BM": 512}, warps=4)
    assert any("spills" in fault for fault in aot.resource_usage(wide, "sm_80").faults("sm_80", "generated"))
    good = aot.resource_usage(call, "sm_80")
    assert good.faults("sm_80", "generated") == []
    assert good._replace(warnings=("C7515",)).faults("sm_80", "generated") == ["ptxas warns of C7515"]
    assert good._replace(matrix_instructions=0).faults("sm_80", "generated") == ["uses no matrix unit"]
    assert len(good._replace(shared_memory=1 << 20).faults("sm_80", "generated")) == 1
    assert "through shared memory" in good.faults("sm_90", "generated")[0]


def test_a_call_is_compiled_as_it_is_launched():
    """Arguments that are 1 or None are constants of the signature, and multiples of 16 are marked."""
    case = next(aot.cases("sm_90", torch.bfloat16, False, "even"))
    source = aot.source(case.call)
    assert source.signature["a_ptr"] == "constexpr"
    assert source.signature["su_c"] == "constexpr"
    assert source.signature["u_ptr"] == "*bf16"
    assert source.signature["h"] == "tensordesc<bf16[128, 64]>"
    assert (source.fn.arg_names.index("M"),) in source.attrs  # 4800


@pytest.mark.parametrize("kernel", ["fold y (256, 128", "fold dz (128, 64", "weight_grad (256, 128"])
def test_no_product_waits_for_a_load(kernel):
    """x, u and g are copied or loaded a step before the hot loop needs them."""
    call = next(case.call for case in aot.cases("sm_90", torch.bfloat16, False, "even") if kernel in case.name)
    loop = hot_loops.hot_loop(aot.disassembled(aot.compiled(call, "sm_90").asm["cubin"]))
    assert loop is not None
    assert loop.exposed == 0
    late = call._replace(constants={**call.constants, "AHEAD": False})
    assert hot_loops.hot_loop(aot.disassembled(aot.compiled(late, "sm_90").asm["cubin"])).exposed > 0


def test_a_step_of_a_small_r_has_several_columns():
    """A step of dx_dz takes instructions that do not depend on R: with one column i, 167 at R = 32."""
    call = next(case.call for case in aot.cases("sm_90", torch.bfloat16, False, "few") if "dx_dz" in case.name)
    loop = hot_loops.hot_loop(aot.disassembled(aot.compiled(call, "sm_90").asm["cubin"]))
    assert call.constants["IB"] == 4
    assert loop.instructions < 4 * 80
    assert loop.exposed == 0


SASS = """
        /*0100*/  HGMMA.64x64x16.F32.BF16 R56, R104, gdesc[UR20], R56 ;  /* 0x0 */
        /*0110*/  LDG.E.U16 R107, desc[UR24][R104.64] ;
        /*0120*/  UTMALDG.2D [UR12], [UR6] ;
        /*0130*/  HGMMA.64x128x16.F32.BF16 R24, R112, gdesc[UR20], R24, gsb0 ;
        /*0140*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0150*/  BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0160*/  @!P0 LDG.E R10, desc[UR24][R104.64] ;
        /*0170*/  STS [R2], R10 ;
        /*0180*/  STS.U16 [R2+0x20], R107 ;
        /*0190*/  @P4 BRA 0x100 ;
        /*01a0*/  @P5 BRA `(.L_x_1) ;
        /*01b0*/  IMAD R1, R1, R1, R1 ;
        /*01c0*/  @P4 BRA 0x0 ;
        /*01d0*/  EXIT ;
        /*01e0*/  HGMMA.64x128x16.F32.BF16 R24, R112, gdesc[UR20], R24, gsb0 ;
        /*01f0*/  BRA 0x150 ;
"""


def test_a_hot_loop_is_read():
    """The loop of the products is found, and which load is too late; copies by descriptors are no loads."""
    loop = hot_loops.hot_loop(SASS)
    assert loop == hot_loops.HotLoop(10, 1, 1, 1, 2, 1, 2 * 64 * 16 * (64 + 128))
    assert hot_loops.hot_loop(SASS.replace("HGMMA", "HMMA")) is None


def test_published_shapes_are_planned_for_a_gpu():
    """The table has forward and backward of each shape, with the launches and tiles that a GPU would have."""
    planned = {name: [call.kernel.__name__ for call in calls] for name, calls in hot_loops.published()}
    assert set(planned) == set(hot_loops.SHAPES)
    assert {"fold", "dx_dz", "weight_grad"} <= set(planned["qm9"])
    assert hot_loops.fill(153, 132) == 153 / 264
    assert hot_loops.fill(132, 132) == 1
