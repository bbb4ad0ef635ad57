"""Every kernel of csrc/cuda compiles for every arch without spills, stack or warnings. No GPU is needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
import resource_usage
from resource_usage import ARCHS, SOURCES, Kernel

pytestmark = pytest.mark.skipif(resource_usage.missing() is not None, reason=str(resource_usage.missing()))


@pytest.fixture
def usage_of(request):
    """Return the resource usage of a file, cached between runs until the sources change."""
    cache = request.config.cache.mkdir("resource_usage")
    return lambda *args: resource_usage.resource_usage(*args[:2], cache, *args[2:])


def _files():
    """Return all files with kernels, for each arch."""
    files = [path for path in sorted(SOURCES.glob("*.cu")) if not path.stem.endswith("library")]
    return [pytest.param(path, arch, id=f"{path.stem}-{arch}") for path in files for arch in ARCHS]


@pytest.mark.parametrize(("source", "arch"), _files())
def test_every_kernel_is_clean(source, arch, usage_of):
    usage = usage_of(source, arch)
    assert usage.kernels or (source.stem.startswith("hopper") and arch != "sm_90a")
    faults = usage.faults(arch)
    assert not faults, "\n".join(faults)


TOYS = """
__global__ void __launch_bounds__(128) clean(float* x) { x[threadIdx.x] *= 2; }

__global__ void unbound(float* x) { x[threadIdx.x] *= 2; }

// Needs more registers than there are, as all values are loaded before a barrier and used after it.
__global__ void __launch_bounds__(1024) spills(float* x) {
  float v[100];
#pragma unroll
  for (int i = 0; i < 100; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 100; ++i) x[i * 1024 + threadIdx.x] = v[(i + 37) % 100] * v[i];
}

// An array indexed at run time.
__global__ void __launch_bounds__(128) stack(float* x, const int* at, int n) {
  float v[32] = {};
  for (int i = 0; i < n; ++i) v[at[i] & 31] += x[i];
  x[threadIdx.x] = v[at[n] & 31];
}

template <int N>
__global__ void __launch_bounds__(128) fold(float* x) { x[threadIdx.x] *= N; }
template __global__ void fold<3>(float*);

namespace inner {
__global__ void __launch_bounds__(128) hopper_fold(float* x) { x[threadIdx.x] *= 2; }
}
"""

# The accumulators are changed before the wait, and setmaxnreg is used without a limit of registers.
SERIAL = """
__global__ void __launch_bounds__(128) hopper_serial(float* out, unsigned long a, unsigned long b, int n) {
  float d[4] = {};
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
  for (int i = 0; i < n; ++i) {
    asm volatile("wgmma.fence.sync.aligned;");
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, 1, 0;"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    d[0] *= 2;
    asm volatile("wgmma.commit_group.sync.aligned;");
    asm volatile("wgmma.wait_group.sync.aligned 0;");
  }
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""


def test_faults_are_seen(usage_of, tmp_path):
    toys = tmp_path / "toys.cu"
    toys.write_text(TOYS)
    usage = usage_of(toys, "sm_90a")
    faults = {kernel.name: kernel.faults() for kernel in usage.kernels}
    assert usage.warnings == ()
    assert faults["clean"] == []
    assert faults["unbound"] == ["has no launch bound"]
    assert any("spills" in fault for fault in faults["spills"])
    assert any("stack" in fault for fault in faults["stack"])
    assert faults["fold"] == ["has no HMMA"]
    assert faults["hopper_fold"] == ["has no HGMMA"]
    assert sum("hopper" in fault for fault in usage.faults("sm_90a")) == 1
    assert not any("hopper" in fault for fault in usage.faults("sm_80"))
    assert usage_of(toys, "sm_90a") == usage  # from the cache


def test_warnings_of_ptxas_are_seen(usage_of, tmp_path):
    serial = tmp_path / "serial.cu"
    serial.write_text(SERIAL)
    usage = usage_of(serial, "sm_90a")
    (kernel,) = usage.kernels
    assert kernel.faults() == []
    assert "HGMMA" in kernel.instructions
    assert any("setmaxnreg" in line for line in usage.warnings)
    assert any("serialized" in line for line in usage.warnings)
    assert set(usage.warnings) <= set(usage.faults("sm_90a"))


def test_too_many_registers_are_seen():
    kernel = Kernel("reduce", "reduce", 168, 512, 0, 0, 0, ())
    assert kernel.faults() == ["takes 168 registers for each of 512 threads"]
    assert kernel._replace(threads=384).faults() == []
    # ptxas counts a spill, but the code has none.
    assert kernel._replace(threads=128, spilled=8).faults() == []


CODE = """
        /*0000*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3+URZ], R4 ;
        /*0020*/              @!P0 BRA 0x10 ;
        /*0030*/                   LDS R5, [R6] ;
        /*0040*/                   WARPGROUP.ARRIVE ;
        /*0050*/                   HGMMA.64x48x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0070*/               @P1 MEMBAR.ALL.GPU ;
        /*0080*/                   SYNCS.ARRIVE.TRANS64.RED.A1T0 RZ, [R7+URZ], RZ ;
        /*0090*/               @P2 BRA 0x30 ;
        /*00a0*/                   UTMALDG.3D.MULTICAST [UR8], [UR4] ;
        /*00b0*/                   BRA 0x0 ;
"""


def test_the_loop_of_products_is_found():
    loop = resource_usage.hot_loop(CODE)
    assert loop == resource_usage.Loop(all=7, products=1, waits=1, mbarriers=1, fences=1, loads=1)
    assert resource_usage.hot_loop(CODE.replace("HGMMA", "FFMA")) == resource_usage.Loop()
    kernel = Kernel("hopper_dx_dz", "", 168, 384, 0, 0, 0, ("HGMMA",), loop)
    assert kernel.faults() == ["has a fence of memory in its loop", "shares no operands in clusters"]
    assert kernel._replace(loop=loop._replace(fences=0), instructions=("HGMMA", "MULTICAST")).faults() == []
