"""The report says what the results say: exact figures, labels of what is from elsewhere, the same bytes every time."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import shutil

import pytest
from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).parent.parent.parent

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(str(ROOT))
    from benchmarks import measure, plots, records, report, roofline, subjects, workloads

MIB = 1 << 20
HERE = records.Context(
    device="AMD EPYC 7B13, AVX2, 32 MiB L3, 2 threads",
    kind="cpu",
    backend="cpu",
    torch="2.13.0+cpu",
    triton="",
    driver="",
    python="3.11.7",
    commit="aaaaaaa",
    date="2026-11-22",
)
GPU = dataclasses.replace(HERE, device="NVIDIA H200", kind="cuda", backend="triton", triton="3.6.0", driver="570.1")
BOTH = "forward + backward"
MODES = ("forward", BOTH, "training step")
PEERS = {
    "materialise + bmm": 1.0,
    "einsum, two": 1.4,
    "compiled einsum, one": 0.8,
    "vmap(functional_call)": 1.6,
    "F.bilinear": 3.0,
}
WORKLOADS = (
    ("synthetic depth", 200, 1, 100, 1000, 10),
    ("synthetic depth", 200, 1, 100, 10, 1),
    ("rotation mnist", 64, 1, 50, 784, 10),
    ("rotation mnist", 64, 1, 50, 10, 12),
    ("rotation cifar", 64, 1, 100, 3072, 10),
    ("qm9 mpnn", 9792, 1, 128, 64, 64),
    ("qm9 graph", 9792, 1, 128, 64, 64, 4),
    ("modelnet mpnn", 8192, 1, 25, 64, 64),
    ("modelnet mpnn", 8192, 1, 25, 64, 128),
    ("diffdock-like", 10000, 1, 144, 48, 48),
    ("qmix mmm2", 5760, 1, 64, 10, 32),
    ("qmix mmm2", 5760, 1, 64, 32, 1),
    ("qmix primary", 5760, 1, 64, 27, 1, 1, 32),
    ("hyper policy", 256, 1, 256, 17, 256),
    ("biaffine labels", 4096, 1, 101, 101, 50),
    ("tiny batch", 32, 1, 64, 10, 32),
    ("colorization", 64, 64, 100, 42, 10),
    ("operator learning", 100, 100, 64, 20, 20),
    ("siren images", 100, 1024, 256, 2, 256),
    ("siren images", 32, 1024, 256, 256, 256),
    ("siren images", 100, 1024, 256, 256, 3),
    ("text-to-lora A", 8, 512, 512, 4096, 8),
    ("text-to-lora B", 8, 512, 512, 8, 4096),
    ("condconv 1x1", 128, 49, 4, 192, 1152),
    ("condconv 1x1", 128, 49, 8, 192, 1152),
)
NAMES = ("workload", "B", "N", "R", "I", "O", "neighbours", "hidden")


def ways(ours=1.0, again=1.0, peers=None, product=None, copy=None, memory=MIB, context=HERE, **of):
    """The records of one subject: seconds of ours, ours again and the peers."""
    sizes = {"B": 100, "N": 1, "R": 64, "I": 64, "O": 64}
    of = {"study": "workloads", "workload": "made up", "mode": BOTH, "context": context, **sizes, **of}

    def timed(way, role, seconds, **more):
        return records.Record(
            way=way, role=role, q1=seconds * 0.9, median=seconds, q3=seconds * 1.2, rounds=9, **{**of, **more}
        )

    found = [
        timed("fasthyper", "ours", ours, temporary=memory, resident=2 * memory),
        timed("fasthyper again", "again", again),
        *(timed(name, "peer", seconds, temporary=9 * memory) for name, seconds in (peers or {"best": 2.0}).items()),
    ]
    for way, rate in (("matrix product", product), ("copy", copy)):
        if rate:
            found.append(timed(way, "ceiling", 1e-3, rate=rate))
    return found


def realistic(context=HERE, seed=0):
    """What a whole run gives."""
    draw = random.Random(seed)
    found = []
    for sizes in WORKLOADS:
        of = dict(zip(NAMES, sizes, strict=False))
        for dtype in ("float32", "bfloat16"):
            product = draw.gauss(150, 12) * 1e9 * (1 if dtype == "float32" else 0.6)
            copy = draw.gauss(18, 1.5) * 1e9
            for mode in MODES:
                like = records.Record(study="workloads", **of, dtype=dtype, mode=mode, context=context)
                seconds = roofline.flops(like) / roofline.bound(like, product, copy) / draw.uniform(0.25, 0.95) + 1e-5
                times = {name: seconds * factor * draw.uniform(1.0, 3.0) for name, factor in PEERS.items()}
                noisy = seconds * draw.uniform(0.93, 1.07)
                subject = ways(seconds, noisy, times, product, copy, context=context, **of, dtype=dtype, mode=mode)
                subject[-3] = dataclasses.replace(subject[-3], rounds=1, q1=None, q3=None, note="tried once")
                subject[4] = dataclasses.replace(subject[4], compile=draw.uniform(5, 20))
                missing = {"q1": None, "median": None, "q3": None, "rounds": None, "temporary": None}
                subject[5] = dataclasses.replace(subject[5], **missing, note="would keep 16 GiB")
                found += subject
    return found + scaling(context, draw) + training(context, draw)


def scaling(context, draw):
    axes = {"B": [2**i for i in range(6, 17)], "N": [4**i for i in range(7)], "R": [4, 16, 64, 256, 1024]}
    axes["width"] = [8, 16, 32, 64, 128, 256, 512]
    found = []
    for axis, points in axes.items():
        for point in points:
            of = {"workload": "qm9 mpnn", "B": 4096, "N": 1, "R": 128, "I": 64, "O": 64, "axis": axis}
            of |= {"I": point, "O": point} if axis == "width" else {axis: point}
            fold = of["B"] * of["N"] * of["R"] * of["I"] * of["O"] * 6 / 1.2e11 + 2e-5
            generate = fold / of["N"] * 1.3 + of["B"] * of["N"] * of["I"] * of["O"] * 6 / 4e10
            times = {"fasthyper, fold": fold, "fasthyper, generate": generate, "fasthyper, project": fold * 1.7}
            wrong = (axis, point) == ("N", 4)
            ours = min(times.values()) * (1.25 if wrong else draw.uniform(0.98, 1.05))
            written = of["B"] * of["I"] * of["O"] * 4 * 2
            peers = {"materialise + bmm": generate * 1.8, "einsum, one": fold * 2.2, "materialise in chunks": fold * 3}
            subject = ways(ours, ours * 1.01, {**times, **peers}, context=context, study="scaling", **of)
            plan = "generate / generate" if generate < fold else "fold / generate" if axis == "R" else "fold / fold"
            plan = "fold / generate" if wrong else plan
            for i, record in enumerate(subject):
                more = {"role": "variant"} if record.way in times else {}
                if record.way == "fasthyper":
                    more = {"plan": plan, "temporary": min(20 * MIB, written)}
                elif record.way in ("materialise + bmm", "einsum, one"):
                    more = {"temporary": written}
                    if written > 700 * MIB:
                        more = {"q1": None, "median": None, "q3": None, "rounds": None, "temporary": None}
                        more["note"] = f"out of memory: {written >> 20} MiB"
                subject[i] = dataclasses.replace(record, **more)
            found += subject
    return found


def training(context, draw):
    found = []
    for name, scale in (("qm9 network", 0.2), ("siren picture", 0.05)):
        for way, role, speed, memory in (("fasthyper", "ours", 1, 3), ("materialised", "peer", 1.9, 310)):
            for step in range(0, 200, 5):
                loss = scale * (0.03 + 2.718 ** (-step / 40)) * draw.uniform(0.95, 1.05)
                of = {"B": 100, "R": 64, "I": 64, "O": 64, "mode": "training step", "context": context}
                seconds = 0.05 * speed * (step + 1)
                found.append(
                    records.Record(
                        study="training", workload=name, way=way, role=role, step=step, loss=loss,
                        median=seconds, temporary=memory * MIB, N=1, **of,
                    )
                )  # fmt: skip
    return found


def few(found):
    """Enough to have every kind of row."""
    kept = ("qm9 mpnn", "condconv 1x1", "siren images", "qmix primary", "qm9 network")
    return [r for r in found if r.workload in kept and (r.axis in ("", "N") or r.B > 8192)]


def marked_readme(folder, *kinds):
    blocks = [f"<!-- benchmarks, {kind}: generated by `make bench` -->\nold {kind}\n<!-- end -->\n" for kind in kinds]
    readme = folder / "README.md"
    readme.write_text("before\n" + "between\n".join(blocks) + "after\n")
    return readme


@pytest.fixture
def undrawn(monkeypatch):
    """Empty figures, where it is the text that matters."""
    for name in ("speedups", "scaling", "roofline", "training"):
        monkeypatch.setattr(plots, name, lambda found: Figure(figsize=(1, 1)))


def lines(found, dtype="float32"):
    return {line.text: line for line in report.figures(found) if line.dtype == dtype}


def test_the_summary_of_a_cpu():
    work = 3 * 2 * 100 * 64 * 64 * 64
    found = [
        *ways(1.0, 1.0, {"best": 8.0, "worse": 9.0}, product=work / 0.9, workload="a"),
        # a head of 63·64·64 < 2¹⁸ is too light for its share to count
        *ways(1.0, 1.5, {"best": 2.0}, product=work / 0.1, R=63, workload="b"),
        *ways(1.0, 1.0, {"best": 4.0}, product=work * 2 / 0.6, R=1024, O=8, memory=7 * MIB, workload="c"),
        *ways(1.0, 1.0, {"best": 0.5}, R=2, workload="tiny batch"),
        *ways(1.0, 1.0, {"best": 99.0}, neighbours=4, workload="graph"),
        *ways(1.0, 1.0, {"best": 99.0}, hidden=32, workload="primary"),
        *ways(1.0, 0.8, {"best": 0.25}, N=2, workload="d"),
        *ways(1.0, 1.0, {"best": 3.0}, mode="forward", workload="a"),
    ]
    seen = lines(found)
    assert [(line.value, line.floor, line.held) for line in seen.values()] == [
        (pytest.approx(4.0), "≥ 2.0", True),  # of 8 and 2
        (pytest.approx(4.0), "≥ 1.6", True),  # of 8, 2 and 4
        (0.5, "≥ 0.95", False),
        (0.25, "≥ 0.9", False),
        (pytest.approx(3.0), "", None),
        (None, "", None),
        (pytest.approx(0.9), "≥ 0.8", True),
        (pytest.approx(0.6), "≥ 0.65", False),
        (7.0, "≤ 40", True),
        (14.0, "≤ 40", True),
        (None, "≤ 1.10", None),
        (0.8, "", None),
        (1.5, "", None),
    ]
    assert seen["speed-up at N = 1, geometric mean"].where == "3 workloads"
    assert seen["noise: our time over our time, most"].where == "b, 64 → 64"


def test_floors_that_need_matrix_units():
    plain = ways(dtype="bfloat16")
    with_amx = ways(dtype="bfloat16", context=dataclasses.replace(HERE, device="Xeon, AVX512 + AMX, 2 threads"))
    name = "speed-up at N = 1, geometric mean"
    assert lines(plain, "bfloat16")[name].floor == ""
    assert lines(with_amx, "bfloat16")[name][2:4] == (2.0, "≥ 2.2 (AMX)")
    assert lines(with_amx, "bfloat16")[name].held is False


def test_the_summary_of_a_gpu():
    found = [
        *ways(1.0, 1.0, {"best": 2.0}, B=1 << 16, product=0.8 * 6 * 2.0**34, context=GPU, workload="qm9 mpnn"),
        *ways(1.0, 1.0, {"best": 8.0}, B=1 << 16, O=128, product=6 * 2.0**35 / 0.8, context=GPU, workload="modelnet"),
        *ways(1.0, 1.0, {"best": 0.5}, N=2, context=GPU, workload="d"),
    ]
    seen = list(lines(found).values())
    assert [(line.value, line.floor) for line in seen[:5]] == [
        (pytest.approx(4.0), "≥ 1.7"),
        (2.0, "≥ 0.95"),
        (8.0, "≥ 4"),
        (2.0, "≥ 2"),
        (0.5, ""),
    ]
    assert [(line.value, line.floor) for line in seen[7:10]] == [
        (pytest.approx(0.8), "≥ 0.75"),
        (pytest.approx(1.25), "≥ 0.6"),
        (1.0, "≤ 64"),
    ]


def test_a_slowed_peer_shows():
    quick = report.markdown(ways(1.0, 1.0, {"bmm": 2.0, "einsum": 3.0}))
    slowed = report.markdown(ways(1.0, 1.0, {"bmm": 4.5, "einsum": 3.0}))
    row = "| made up | 100 | 1 | 64 | 64 → 64 | 1,000 (900–1,200) |"
    assert f"{row} 2,000 (bmm) | 2.00 | 1.00 |  | 1.0 | 2.0 | 9.0 |" in quick
    assert f"{row} 3,000 (einsum) | 3.00 | 1.00 |  | 1.0 | 2.0 | 9.0 |" in slowed


def test_what_was_tried_once_or_not_at_all():
    found = ways(1.0, 1.0, {"bmm": 5.0, "once": 4.0, "never": 1.0})
    once = {"q1": None, "q3": None, "rounds": 1, "note": "tried once"}
    found[3] = dataclasses.replace(found[3], **once)
    found[4] = dataclasses.replace(found[4], **once, temporary=0)
    found[4] = dataclasses.replace(found[4], median=None, rounds=None, note="N = 1 only")
    text = report.markdown(found)
    assert "| made up, 64 → 64 | 1,000 | 1,000 | 5,000 | (4,000) | N = 1 only |" in text
    assert "| 5,000 (bmm) | 5.00 |" in text
    alone = report.markdown([r for r in found if r.way != "bmm"])
    assert "| (4,000) (once) | 4.00 |" in alone


def test_the_share_of_the_roofline():
    # 100·64 + 100·64 + 64·64·64 + 100·64 numbers of 4 bytes, twice; the copy allows 10 byte/s
    work, moved = 6 * 100 * 64**3, 2 * 4 * (3 * 6400 + 64**3)
    like = ways()[0]
    assert (roofline.flops(like), roofline.compulsory_bytes(like)) == (work, moved)
    forward = dataclasses.replace(like, mode="forward", dtype="bfloat16")
    assert (roofline.flops(forward), roofline.compulsory_bytes(forward)) == (work // 3, moved // 4)
    assert roofline.bound(like, 1e3, 1e9) == 1e3
    assert roofline.bound(like, 1e9, 10.0) == pytest.approx(10 * work / moved)
    many = dataclasses.replace(like, N=100)
    assert roofline.flops(many) == work + 6 * 100 * 100 * 64**2  # the weights once, then applied to each point
    primary = dataclasses.replace(like, hidden=32, O=1)
    assert roofline.flops(primary) == 6 * 100 * 64 * (64 * 32 + 32)
    shared = dataclasses.replace(like, neighbours=10)
    assert roofline.flops(shared) == 6 * (10 * 64**3 + 100 * 64 * 64)  # x·H once for ten
    assert "| 1.00 | 0.50 | 1.0 |" in report.markdown(ways(product=2 * work, copy=1e15))
    others = [*ways(), *ways(product=4 * work, copy=1e15, workload="other")]  # without ceilings: those of the file
    assert "| made up | 100 | 1 | 64 | 64 → 64 | 1,000 (900–1,200) | 2,000 (best) | 2.00 | 1.00 | 0.25 |" in (
        report.markdown(others)
    )


def test_what_is_from_elsewhere_is_labelled(monkeypatch):
    old = dataclasses.replace(HERE, commit="bbbbbbb+", date="2026-11-20")
    other = dataclasses.replace(HERE, device="another processor", torch="2.12.0", date="2026-12-24")
    found = [
        *ways(workload="new"),
        *ways(workload="renewed", context=dataclasses.replace(HERE, date="2026-11-21")),
        *ways(workload="old", context=old),
        *ways(workload="elsewhere", context=other),
    ]
    text = report.markdown(found)
    assert text.startswith(f"# fasthyper on {HERE.device}\n")
    assert "commit aaaaaaa, 2026-11-21 to 2026-11-22." in text
    assert (
        "Marked: ᵃ commit bbbbbbb+, 2026-11-20. ᵇ commit aaaaaaa, 2026-12-24; device another processor; torch 2.12.0.\n"
    ) in text
    for name in ("new", "renewed", "oldᵃ", "elsewhereᵇ"):
        assert f"\n| {name} | 100 |" in text
    assert "\n| old, 64 → 64ᵃ | 1,000 |" in text
    monkeypatch.setattr(report, "WORKLOADS", [workloads.Workload("old", 100, 1, 64, 64, 64, "made up", readme=True)])
    short = report.short(found, pathlib.Path("results/x.csv"), pathlib.Path())
    assert "| oldᵃ | 100 |" in short
    assert "| new |" not in short
    assert "ᵃ commit bbbbbbb+, 2026-11-20. ᵇ" in short
    title = plots.speedups(found).get_suptitle()
    assert "commit aaaaaaa, 2026-11-21 to 2026-11-22" in title
    assert "ᵃ commit bbbbbbb+, 2026-11-20" in title
    assert "ᵃ" not in report.markdown(ways())


def test_the_planner_is_checked():
    found = [r for r in realistic() if r.study == "scaling"]
    text = report.markdown(found)
    assert (
        "took more than 1.10 times the best schedule at 1 of 30 points:\n\n- qm9 mpnn, 64 → 64, N = 4 along N" in text
    )
    assert "float32: 1.25 times fasthyper, generate; noise 1.01\n" in text
    assert "| generate | **1.25** | 1.01 |" in text
    line = lines(found)["planner over the best schedule, most"]
    assert (line.value, line.where, line.held) == (pytest.approx(1.25), "qm9 mpnn, 64 → 64, N = 4", False)
    assert "\n| 16,384 | fold / fold |" in text
    right = [r for r in found if (r.axis, r.N) != ("N", 4)]
    assert "at 0 of 29 points." in report.markdown(right)
    one = [dataclasses.replace(r, plan="generate") if r.plan == "fold / generate" and r.N == 4 else r for r in found]
    assert "at 0 of 30 points." in report.markdown(one)  # the same order on both sides, whatever calling it costs


def test_the_scaling_figure_shows_choices_and_where_memory_ends():
    figure = plots.scaling([r for r in realistic() if r.study == "scaling"])
    assert len(figure.axes) == 8
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert ["out of memory" in of for of in texts] == [True, False, False, True] * 2
    assert [texts[1].count(letters) for letters in ("g", "f", "f/g")] == [5, 1, 1]
    assert texts[2].count("f/g") == 5
    assert HERE.commit in figure.get_suptitle()


def test_time_to_a_loss():
    ours, theirs = ([(1.0, 5.0), (2.0, 1.0), (3.0, 3.0)], [(2.0, 5.0), (6.0, 2.0), (8.0, 2.5)])
    found = [
        records.Record(
            study="training", workload="net", way=way, role=role, step=i, median=seconds, loss=loss,
            temporary=memory * MIB, context=HERE,
        )
        for way, role, curve, memory in (("fasthyper", "ours", ours, 3), ("materialised", "peer", theirs, 300))
        for i, (seconds, loss) in enumerate(curve)
    ]  # fmt: skip
    assert "| net, float32 | 2 | 2.00 | 6.00 (materialised) | 3.00 | 3.0 | 300.0 |" in report.markdown(found)
    axes = plots.training(found).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "fasthyper: 2.00 s, 3.0 MiB at most",
        "materialised: 6.00 s, 300.0 MiB at most",
    ]


def test_every_workload_has_a_number_in_the_roofline():
    found = few(realistic())
    figure = plots.roofline(found)
    labels = {s.of.workload for s in subjects.Results(found).among("workloads")}
    names = figure.axes[1].texts[0].get_text().splitlines()
    assert {name.split(",")[0].split("  ")[1] for name in names} == labels
    assert sorted(int(text.get_text()) for text in figure.axes[0].texts) == list(range(1, len(names) + 1))


def test_the_readme_block_is_replaced_and_the_rest_kept(tmp_path, undrawn):
    records.write(tmp_path / "results" / f"{HERE.slug}.csv", few(realistic()))
    readme = marked_readme(tmp_path, "cpu", "cuda")
    written = report.write_all(tmp_path / "results", readme)
    text = readme.read_text()
    head, rest = text.split("<!-- benchmarks, cuda: generated by `make bench` -->\n")
    assert rest == "old cuda\n<!-- end -->\nafter\n"
    assert head.startswith("before\n<!-- benchmarks, cpu: generated by `make bench` -->\n\n| workload |")
    assert head.endswith("-scaling.png)\n\n<!-- end -->\nbetween\n")
    assert "old cpu" not in head
    assert f"[{HERE.slug}.md](results/{HERE.slug}.md)" in head
    assert head.count("\n| siren images |") == 1  # its largest layer
    assert "| 256 → 256 |" in head
    names = [f"{HERE.slug}{end}" for end in (".md", "-speedups.png", "-scaling.png", "-roofline.png", "-training.png")]
    assert [path.name for path in written] == [*names, "README.md"]
    assert all(path.exists() for path in written)


def test_the_newest_file_of_a_kind_is_in_the_readme(tmp_path, undrawn):
    late = dataclasses.replace(HERE, device="a later processor", date="2026-12-01")
    for context in (HERE, late):
        records.write(tmp_path / f"{context.slug}.csv", ways(context=context))
    readme = marked_readme(tmp_path, "cpu")
    report.write_all(tmp_path, readme)
    assert "a later processor; commit aaaaaaa, 2026-12-01" in readme.read_text()
    assert HERE.device not in readme.read_text()


def test_a_readme_without_an_end_is_left_alone(tmp_path, undrawn):
    records.write(tmp_path / "here.csv", ways())
    readme = marked_readme(tmp_path, "cpu")
    cut = readme.read_text().replace("<!-- end -->", "")
    readme.write_text(cut)
    with pytest.raises(ValueError, match="no <!-- end -->"):
        report.write_all(tmp_path, readme)
    assert readme.read_text() == cut


def test_twice_gives_the_same_bytes_and_what_has_no_data_goes(tmp_path):
    source = tmp_path / "here.csv"
    records.write(source, [r for r in few(realistic()) if r.axis in ("", "N") and r.workload != "siren images"])
    readme = marked_readme(tmp_path, "cpu")
    written = report.write_all(tmp_path, readme)
    first = {path: path.read_bytes() for path in written}
    assert len(first) == 6
    assert report.write_all(tmp_path, readme) == written
    assert {path: path.read_bytes() for path in written} == first
    records.write(source, ways())
    report.write_all(tmp_path, readme)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["here-roofline.png", "here-speedups.png"]


def test_what_is_published_is_what_was_measured(tmp_path, undrawn):
    sources = sorted(records.RESULTS.glob("*.csv"))
    if not sources:
        pytest.skip("nothing has been measured")
    folder, readme = tmp_path / "benchmarks" / "results", tmp_path / "README.md"
    folder.mkdir(parents=True)
    for source in sources:
        assert all(map(measure.listed, records.read(source))), "the registry has other sizes: `make bench`"
        shutil.copy(source, folder)
    shutil.copy(ROOT / "README.md", readme)
    report.write_all(folder, readme)
    assert readme.read_text() == (ROOT / "README.md").read_text()
    for page in folder.glob("*.md"):
        assert page.read_text() == (records.RESULTS / page.name).read_text()
