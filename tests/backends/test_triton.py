"""The Triton kernels: their tiles, their workspace, their precision. test_kernels.py tests their results.

They run on a GPU if there is one; else in Triton's interpreter, in a separate run of `make test`, because importing
triton selects it.
"""

from __future__ import annotations

import json
import threading
import types

import pytest
import torch

import fasthyper
from fasthyper.backends import gpu, gpu_auto, triton
from fasthyper.backends.triton import tiles

ready = pytest.mark.skipif(triton.unavailable() is not None, reason=f"Triton kernels: {triton.unavailable()}")
ALL = (True,) * 6
NAMES = ("x", "z", "weight", "bias", "base_weight", "g")


def everything(x, z, weight, bias, base_weight, g, schedule="fold"):
    """Return y, dx, dz, dH and the gradients of bias, W0, b0."""
    y = triton.apply(x, z, weight, bias, base_weight, schedule=schedule)
    return y, *triton.grads(x, z, weight, bias, base_weight, g, ALL, schedule=schedule)


@ready
@pytest.mark.parametrize(
    ("room", "sizes"),
    [
        (1000, (20, 1, 33, 9, 7)),  # no copy fits
        (1000, (5, 9, 20, 7, 8)),  # dz of several points is summed one instance at a time
        (600, (2, 40, 20, 3, 8)),  # and some points at a time
        (8000, (20, 1, 33, 9, 7)),  # a padded copy of z fits, but not of H
        (4000, (100, 1, 5, 3, 4)),  # a copy of H fits, and of some instances of z
    ],
    ids=str,
)
def test_little_workspace(room, sizes, factors, oracle, monkeypatch):
    """There is no room for partial sums, or for padded copies; memory after H holds NaN."""
    monkeypatch.setattr(gpu, "partial_sums_limit", lambda: room)
    args = factors(sizes, torch.float32, NAMES)
    behind = torch.full((args[2].numel() + 1000,), float("nan"), device=args[2].device)
    behind[: args[2].numel()] = args[2].flatten()
    args[2] = behind[: args[2].numel()].view_as(args[2])
    oracle.check_linear(args, everything(*args))


@ready
@pytest.mark.parametrize(
    ("dtype", "sizes", "copied"),  # copied: on a GPU that has tensor descriptors
    [
        (torch.float32, (33, 1, 20, 6, 10), False),
        (torch.float32, (6, 3, 20, 4, 6), False),
        (torch.float32, (20, 1, 36, 9, 40), False),  # dx and dz in separate kernels, and steps with a tail
        (torch.float32, (33, 1, 12, 6, 10), True),  # short rows
        (torch.float32, (33, 1, 50, 8, 10), True),
        (torch.bfloat16, (33, 1, 40, 6, 10), False),
        (torch.bfloat16, (33, 1, 50, 8, 10), True),
        (torch.float16, (6, 3, 104, 4, 6), False),
    ],
    ids=str,
)
def test_aligned_rows_are_not_copied(dtype, sizes, copied, factors, oracle, monkeypatch):
    """Memory after z and H holds NaN."""
    from fasthyper.backends.triton import calls

    copies, pad_call = [], calls.pad_call
    monkeypatch.setattr(calls, "pad_call", lambda *args: copies.append(args) or pad_call(*args))
    args = factors(sizes, dtype, NAMES)
    for k in (1, 2):
        behind = torch.full((args[k].numel() + 100,), float("nan"), dtype=dtype, device=args[k].device)
        behind[: args[k].numel()] = args[k].flatten()
        args[k] = behind[: args[k].numel()].view_as(args[k])
    oracle.check_linear(args, everything(*args))
    if triton.interpreting() or torch.cuda.get_device_capability() in ((9, 0), (10, 0)):
        assert bool(copies) is copied
    offset = lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t)
    odd = lambda t: torch.cat([t, t[..., :1]], -1)[..., :-1]
    for k, unaligned in ((1, offset), (1, odd), (2, offset), (2, odd)):
        copies.clear()
        some = [unaligned(t) if i == k else t for i, t in enumerate(args)]
        oracle.check_linear(args, everything(*some))
        assert copies


@pytest.mark.parametrize(
    ("R", "dtype", "in_place"),
    [
        (48, torch.bfloat16, True),
        (40, torch.bfloat16, True),
        (20, torch.float32, True),
        (25, torch.bfloat16, False),
        (50, torch.bfloat16, False),
        (50, torch.float32, False),
    ],
)
def test_boxes_begin_at_aligned_addresses(R, dtype, in_place):
    """With 64 inputs the rows of o are aligned, but not those of (o, i): a GPU cannot read boxes that begin there."""
    calls = pytest.importorskip("fasthyper.backends.triton.calls")
    x, z, h, g, dx, dz = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((9, 1, 64), (9, R), (32, 64, R), (9, 1, 32), (9, 64), (9, R))
    )
    tile = tiles.Tile(64, 64, 32, 4, 2)
    rows = z[:, None]
    y = calls.fold_call(x, rows, h.permute(1, 2, 0), None, None, None, g[:, 0], 64, tile, "sm_90", "tf32")
    both = calls.dx_dz_call(x, z, h, None, None, g, dx, dz, 64, tile, "sm_90", "tf32")
    reads = [call.constants["READ"] for call in (y, both)]
    assert reads == (["p_ck", "i_o_r"] if in_place else ["pointers"] * 2)


@ready
@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize(
    ("R", "dtype"),
    [(16, torch.bfloat16), (20, torch.float32), (24, torch.float32), (25, torch.float32), (40, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("factor", ["x", "z", "weight", "g"])
def test_nan_stays_in_the_results_that_depend_on_it(factor, R, dtype, points, factors):
    """Boxes of H are as wide as a power of two: they must not take a NaN of the next row."""
    args = dict(zip(NAMES, factors((20, points, R, 6, 10), dtype, NAMES), strict=True))
    args[factor][(1, 2 if factor == "weight" else 0, 3)[: args[factor].dim()]] = float("nan")
    y, dx, dz, dh, *_ = everything(*args.values())
    x, z, weight, g = (args[name].double() for name in ("x", "z", "weight", "g"))
    exact = (
        torch.einsum("bni,br,oir->bno", x, z, weight),
        torch.einsum("bno,br,oir->bni", g, z, weight),
        torch.einsum("bni,bno,oir->br", x, g, weight),
        torch.einsum("bni,br,bno->oir", x, z, g),
    )
    for name, mine, true in zip(("y", "dx", "dz", "dh"), (y, dx, dz, dh), exact, strict=True):
        assert not (mine.isnan() & ~true.isnan()).any(), name


@ready
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(70, 1, 20, 24, 10), (70, 1, 40, 24, 10)], ids=str)  # dx and dz at once, and apart
def test_the_last_blocks_are_a_call_of_their_own(sizes, dtype, factors, oracle, monkeypatch):
    """Four processors compute four of five blocks at once; the sum of the fifth is split."""
    from fasthyper.backends.triton import recording, tuning

    if not triton.interpreting():
        pytest.skip("a GPU has more processors")
    monkeypatch.setattr(tuning, "_LAUNCH", 0.0)
    tuning.candidate.cache_clear()
    launched = []
    launch = recording.Call.launch
    monkeypatch.setattr(recording.Call, "launch", lambda call: (launched.append(call), launch(call)))
    args = factors(sizes, dtype, NAMES)
    oracle.check_linear(args, everything(*args))
    tuning.candidate.cache_clear()
    parts = {name: [c for c in launched if c.kernel.__name__ == name][:2] for name in ("fold", "dx_dz")}
    for first, rest in filter(None, parts.values()):
        splits = 1 if first.kernel.__name__ == "dx_dz" else 2
        assert (first.args["M"], rest.args["M"]) == (64, 6)
        assert first.grid[splits] == 1 < rest.grid[splits]


def test_auto_takes_it_for_a_gpu(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    assert fasthyper.backends.backend("auto", gpu) is gpu_auto
    assert fasthyper.backends.backend("triton", gpu) is triton
    monkeypatch.setattr(triton, "unavailable", lambda: "no")
    assert fasthyper.backends.backend("auto", gpu) is fasthyper.backends.aten


@pytest.mark.parametrize(("name", "ready"), [("gfx942:sramecc+:xnack-", True), ("gfx90a", False), ("gfx1100", False)])
def test_of_amds_gpus_it_takes_those_that_it_is_compiled_for(name, ready, monkeypatch):
    properties = types.SimpleNamespace(gcnArchName=name)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for function, value in {
        "is_available": True,
        "get_device_name": "AMD Test",
        "current_device": 0,
        "get_device_properties": properties,
    }.items():
        monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)
    why = gpu.unsuitable()
    assert why is None if ready else f"AMD Test is {name}" in why


@pytest.mark.parametrize(
    ("arch", "nearest"),
    [
        ("sm_80", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_80"),
        ("gfx942", "gfx942"),
        ("interpreter", "interpreter"),
    ],
)
def test_other_archs_take_the_tiles_of_a_known_one(arch, nearest):
    assert tiles.nearest(arch) == nearest


def test_two_threads_that_capture_leave_no_hook(monkeypatch):
    """Triton's hook is that of all threads: it is as before when the last thread is done, whichever was first."""
    knobs = pytest.importorskip("triton").knobs
    from fasthyper.backends.triton import capture

    monkeypatch.setattr(capture, "is_capturing", lambda: True)
    seen = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **given: seen.append(given))
    own = knobs.runtime.jit_cache_hook
    kernel = types.SimpleNamespace(__name__="fold")
    entered, left = threading.Event(), threading.Event()

    def other():
        with capture.refusing_to_compile(kernel):
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    with capture.refusing_to_compile(kernel):
        thread.start()
        assert entered.wait(10)
        with pytest.raises(RuntimeError, match="fold is not compiled yet"):
            knobs.runtime.jit_cache_hook(key=1)
    knobs.runtime.jit_cache_hook(key=2)  # this thread is done
    left.set()
    thread.join()
    assert knobs.runtime.jit_cache_hook is own
    assert seen == [{"key": 2}]


class TestTuning:
    """The choice of a tile, with times that the test makes up."""

    @pytest.fixture
    def tuning(self, monkeypatch, tmp_path):
        pytest.importorskip("triton")
        from fasthyper.backends.triton import tuning

        monkeypatch.setenv("FASTHYPER_CACHE", str(tmp_path))
        monkeypatch.delenv("FASTHYPER_AUTOTUNE", raising=False)
        tuning.forget()
        yield tuning
        tuning.forget()

    @pytest.fixture
    def device(self):
        return gpu.Device("NVIDIA Test 9000", "sm_90", 132)

    @staticmethod
    def candidates(tuning, count=5):
        return [tuning.Candidate(tiles.Tile(16 << i, 64, 64, 8, 3), 1, 1.0 - i / 10) for i in range(count)]

    def test_the_fastest_of_the_lowest_predictions_is_stored(self, tuning, device, monkeypatch):
        ours = self.candidates(tuning)
        timed = []
        monkeypatch.setattr(tuning, "_time", lambda run, c: (timed.append(c), c.seconds)[1] * -1)
        key = ("fold", torch.bfloat16, (64, 1), True)
        assert tuning.choose(key, ours, device, lambda c: None) is ours[2]
        assert timed == [ours[4], ours[3], ours[2]]
        kept = json.loads(tuning.path(device).read_text())
        assert kept == {"fold torch.bfloat16 (64, 1) True": list(ours[2].tile)}
        tuning.forget()  # as in another process
        monkeypatch.setattr(tuning, "_time", lambda run, c: pytest.fail("timed again"))
        assert tuning.choose(key, ours, device, lambda c: None) is ours[2]

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"fold 1": 3}', '{"fold 1": [1, 2, 3, 4, 5]}'])
    def test_a_file_with_other_content_is_timed_again(self, text, tuning, device, monkeypatch):
        ours = self.candidates(tuning)
        monkeypatch.setattr(tuning, "_time", lambda run, c: c.seconds)
        tuning.path(device).write_text(text)
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[4]
        assert json.loads(tuning.path(device).read_text())["fold 1"] == list(ours[4].tile)

    def test_choices_cannot_be_stored(self, tuning, device, monkeypatch):
        monkeypatch.setenv("FASTHYPER_CACHE", "/proc/nowhere")
        monkeypatch.setattr(tuning, "_time", lambda run, c: c.seconds)
        ours = self.candidates(tuning)
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[4]

    def test_no_tile_is_timed_while_a_graph_captures(self, tuning, device, monkeypatch):
        ours = self.candidates(tuning)
        capturing = lambda state: monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(tuning, "_time", lambda run, c: -c.seconds)
        capturing(True)
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[4]  # the lowest prediction
        capturing(False)
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[2]
        capturing(True)
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[2]
        tuning.forget()
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[2]  # from disk

    def test_choices_of_this_process_stay(self, tuning, device, monkeypatch):
        ours = self.candidates(tuning)
        monkeypatch.setattr(tuning, "_time", lambda run, c: c.seconds)
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[4]
        tuning.path(device).write_text(json.dumps({"fold 1": ours[3].tile}))  # of another process
        tuning.choose(("fold", 2), ours, device, lambda c: None)
        assert tuning.choose(("fold", 1), ours, device, lambda c: None) is ours[4]

    def test_the_lowest_prediction_is_taken_where_timing_is_disabled(self, tuning, device, monkeypatch):
        ours = self.candidates(tuning)
        monkeypatch.setenv("FASTHYPER_AUTOTUNE", "0")
        assert tuning.choose(("fold", 1), ours, device, lambda c: pytest.fail("ran")) is ours[4]
        monkeypatch.delenv("FASTHYPER_AUTOTUNE")
        torch.use_deterministic_algorithms(True)
        try:
            assert tuning.choose(("fold", 1), ours, device, lambda c: pytest.fail("ran")) is ours[4]
        finally:
            torch.use_deterministic_algorithms(False)

    def test_a_sum_is_split_where_blocks_are_few(self, tuning):
        tile = tiles.Tile(256, 64, 64, 8, 4)
        tiling = tuning.Tiling(2, 256, 64, 128 * 64, 64)
        few = tuning.candidate(tile, tiling, 1 << 16, 16 << 20, 132, 16)
        many = tuning.candidate(tile, tiling._replace(blocks=13200), 1 << 16, 16 << 20, 132, 16)
        assert few.splits > 8
        assert many.splits == 1
        assert tuning.candidate(tile, tiling, 1 << 16, 1 << 17, 132, 16).splits <= 2  # no room for more

    def test_the_last_blocks_are_split_where_they_fill_no_wave(self, tuning):
        tile = tiles.Tile(256, 64, 64, 8, 4)
        tiling = tuning.Tiling(153, 256, 64, 128 * 64, 64, 1)
        predict = lambda t: tuning.candidate(tile, t, 153 << 16, 64 << 20, 132, 16)
        apart, together = predict(tiling), predict(tiling._replace(across=0))
        assert (apart.whole, apart.splits) == (132, 6)
        assert (together.whole, together.splits) == (0, 1)
        assert apart.seconds < 0.7 * together.seconds
        assert predict(tiling._replace(blocks=132)).whole == 0
        assert predict(tiling._replace(blocks=263)).whole == 0  # the last wave is full
        assert predict(tiling._replace(blocks=100)).whole == 0
        assert predict(tiling._replace(blocks=306, across=2)).whole == 132  # rows of two blocks
        assert predict(tiling._replace(depth=64)).whole == 0  # the launches would take longer


class TestPrecision:
    """float32 is multiplied with the precision that torch allows for its own products."""

    @pytest.fixture
    def calls(self):
        pytest.importorskip("triton")
        from fasthyper.backends.triton import calls

        return calls

    def test_by_arch(self, calls):
        assert calls.precision_of(torch.float32, "sm_90", False) == "tf32x3"
        assert calls.precision_of(torch.float32, "sm_90", True) == "tf32"
        assert calls.precision_of(torch.float32, "gfx942", False) == "ieee"
        assert calls.precision_of(torch.float32, "interpreter", False) == "ieee"

    def test_torch_says_what_is_allowed(self):
        before = torch.get_float32_matmul_precision()
        try:
            for setting, allowed in (("highest", False), ("high", True)):
                torch.set_float32_matmul_precision(setting)
                assert gpu.allows_tf32() is allowed
        finally:
            torch.set_float32_matmul_precision(before)
