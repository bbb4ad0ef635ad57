"""Which backend a call takes: forced or not, by thread and by process, compiled or not, in forward and in backward."""

from __future__ import annotations

import threading

import pytest
import torch

import fasthyper
from fasthyper import backends, hyper_linear, planner, set_backend, use_backend
from fasthyper.backends import cpu
from fasthyper.problem import SCHEDULES

AUTO = "aten" if cpu.unavailable() else "cpu"  # the backend that auto chooses for CPU tensors


@pytest.fixture
def ran(monkeypatch):
    """Return the calls that ran, as (backend, method, schedule), without those that one backend passes to another.

    No plan is remembered here, because a call with a remembered plan bypasses Python (see test_cpu.py).
    """
    monkeypatch.setattr(cpu, "_remember", lambda *_: None)
    planner.forget()
    calls: list[tuple[str, str, str]] = []
    within = threading.local()

    def spy(name, method, original):
        def call(*args, schedule):
            if getattr(within, "call", False):
                return original(*args, schedule=schedule)
            calls.append((name, method, schedule))
            within.call = True
            try:
                return original(*args, schedule=schedule)
            finally:
                within.call = False

        return call

    for name, module in backends.BACKENDS.items():
        for method in ("apply", "grads"):
            monkeypatch.setattr(module, method, spy(name, method, getattr(module, method)))
    return calls


def forward_and_backward(backend: str, schedule: str = "auto") -> list[tuple[str, str, str]]:
    return [(backend, "apply", schedule), (backend, "grads", schedule)]


@pytest.fixture
def leaves():
    shapes = ((4, 3), (4, 5), (6, 3, 5), (6, 5), (6, 3), (6,))
    return [torch.randn(s, requires_grad=True) for s in shapes]


def affine(x, z, weight, bias, base_weight, base_bias):
    return hyper_linear(x, z, weight, bias, base_weight=base_weight, base_bias=base_bias)


def plain(x, z, weight, *_):
    return fasthyper.ops.apply(x[:, None], z, weight)


@pytest.fixture(params=[affine, plain])
def f(request):
    return request.param


def in_thread(task):
    """Run a task in another thread, and raise its exception in this one."""
    failure = []

    def guarded():
        try:
            task()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


FORCED = [("aten", None), *(("aten", s) for s in SCHEDULES), ("materialised", None), ("auto", "fold"), (AUTO, None)]


@pytest.mark.parametrize(("name", "schedule"), FORCED)
def test_a_forced_backend_runs_forward_and_backward(name, schedule, f, leaves, ran):
    runs = AUTO if name == "auto" else name
    with use_backend(name, schedule):
        f(*leaves).sum().backward()
    assert ran == forward_and_backward(runs, schedule or "auto")
    ran.clear()
    set_backend(name, schedule)
    f(*leaves).sum().backward()
    assert ran == forward_and_backward(runs, schedule or "auto")


def test_by_default_the_planner_chooses(f, leaves, ran):
    f(*leaves).sum().backward()
    assert ran == forward_and_backward(AUTO, "auto")


def test_forward_decides_for_backward(f, leaves, ran):
    with use_backend("materialised"):
        y = f(*leaves)
    set_backend("aten", "fold")
    y.sum().backward()
    assert ran == forward_and_backward("materialised")


def test_backward_in_another_thread_with_another_choice(f, leaves, ran):
    with use_backend("aten", "project"):
        y = f(*leaves)

    def backward():
        with use_backend("materialised"):
            y.sum().backward()

    in_thread(backward)
    assert ran == forward_and_backward("aten", "project")


def test_forward_decides_for_the_second_order(f, leaves, ran):
    with use_backend("aten", "generate"):
        y = f(*leaves)
    wanted = leaves if f is affine else leaves[:3]
    first = torch.autograd.grad((y**2).sum(), wanted, create_graph=True)
    torch.autograd.grad(sum((t**2).sum() for t in first), wanted)
    assert len(ran) > 2
    assert {(backend, schedule) for backend, _, schedule in ran} == {("aten", "generate")}


def test_an_unforced_forward_stays_unforced_in_backward(f, leaves, ran):
    """A choice made after forward does not change its backward, even if forward ran with auto."""
    y = f(*leaves)
    with use_backend("materialised"):
        y.sum().backward()
    assert ran == forward_and_backward(AUTO, "auto")


def test_choices_nest(f, leaves, ran):
    with use_backend("aten", "fold"):
        with use_backend("materialised"):
            f(*leaves)
        f(*leaves)
        with use_backend("auto"):
            f(*leaves)
    f(*leaves)
    assert [(backend, schedule) for backend, _, schedule in ran] == [
        ("materialised", "auto"), ("aten", "fold"), (AUTO, "auto"), (AUTO, "auto"),
    ]  # fmt: skip


def test_one_choice_can_be_entered_twice():
    choice = use_backend("aten", "fold")
    with use_backend("materialised"):
        with choice:
            with choice:
                assert backends.current() == ("aten", "fold")
            assert backends.current() == ("aten", "fold")
        assert backends.current() == ("materialised", "auto")
    assert backends.current() == backends.Choice()


def test_an_exception_restores_the_choice():
    with pytest.raises(KeyError, match="mine"), use_backend("materialised"):
        raise KeyError("mine")
    assert backends.current() == backends.Choice()


def test_the_choice_of_a_thread_overrides_that_of_the_process():
    set_backend("materialised")
    with use_backend("aten", "fold"):
        assert backends.current() == ("aten", "fold")
        set_backend("aten", "project")
        assert backends.current() == ("aten", "fold")
    assert backends.current() == ("aten", "project")


def test_only_the_choice_of_the_process_holds_in_other_threads():
    seen = []
    set_backend("aten", "generate")
    with use_backend("materialised"):
        in_thread(lambda: seen.append(backends.current()))
    assert seen == [("aten", "generate")]


def test_threads_that_run_together_keep_their_choices(leaves, ran):
    barrier = threading.Barrier(4)
    seen: dict[str, set] = {}

    def work(schedule):
        with use_backend("aten", schedule):
            for _ in range(20):
                barrier.wait()
                seen.setdefault(schedule, set()).add(backends.current().schedule)
                affine(*[t.detach() for t in leaves])

    threads = [threading.Thread(target=work, args=(s,)) for s in (*SCHEDULES, "auto")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {s: {s} for s in (*SCHEDULES, "auto")}
    assert {schedule for _, _, schedule in ran} == {*SCHEDULES, "auto"}


class TestCompiled:
    @pytest.fixture(autouse=True)
    def compiled(self, f):
        torch._dynamo.reset()
        yield torch.compile(f, fullgraph=True, backend="aot_eager")
        torch._dynamo.reset()

    def test_a_change_of_choice_recompiles(self, compiled, leaves, ran):
        def run():
            ran.clear()
            compiled(*leaves).sum().backward()
            return list(ran)

        assert run() == forward_and_backward(AUTO, "auto")
        with use_backend("aten", "fold"):
            assert run() == forward_and_backward("aten", "fold")
        with use_backend("materialised"):
            assert run() == forward_and_backward("materialised")
        assert run() == forward_and_backward(AUTO, "auto")
        set_backend("aten", "project")
        assert run() == forward_and_backward("aten", "project")
        with use_backend("materialised"):
            assert run() == forward_and_backward("materialised")
        set_backend("auto")
        assert run() == forward_and_backward(AUTO, "auto")

    def test_a_choice_made_in_the_region(self, f, leaves, ran):
        def region(*args):
            with use_backend("aten", schedule="fold"):
                return f(*args)

        torch.compile(region, fullgraph=True, backend="aot_eager")(*leaves).sum().backward()
        assert ran == forward_and_backward("aten", "fold")
        assert backends.current() == backends.Choice()

    def test_another_thread_does_not_take_the_choice(self, compiled, leaves, ran):
        with use_backend("materialised"):
            compiled(*leaves).sum().backward()
            in_thread(lambda: compiled(*leaves).sum().backward())
        assert ran == forward_and_backward("materialised") + forward_and_backward(AUTO)

    def test_forward_decides_for_backward_in_a_region(self, compiled, leaves, ran):
        with use_backend("materialised"):
            y = compiled(*leaves)
        with use_backend("aten", "fold"):
            y.sum().backward()
        assert ran == forward_and_backward("materialised")


@pytest.mark.parametrize("force", [use_backend, set_backend])
@pytest.mark.parametrize("name", ["atem", "", "cuda graphs", None])
def test_an_unknown_backend_raises(force, name):
    known = ", ".join(["auto", *backends.BACKENDS])
    assert known.startswith("auto, aten, cpu, triton, cuda, materialised")
    with pytest.raises(ValueError, match=f"backend must be one of {known}, got") as error:
        force(name)
    assert repr(name) in str(error.value)
    assert backends.current() == backends.Choice()


@pytest.mark.parametrize("force", [use_backend, set_backend])
@pytest.mark.parametrize("schedule", ["folded", "", 3])
def test_an_unknown_schedule_raises(force, schedule):
    with pytest.raises(
        ValueError, match="schedule must be one of auto, fold, generate, project, aggregate, got"
    ) as error:
        force("aten", schedule)
    assert repr(schedule) in str(error.value)


@pytest.mark.parametrize("force", [use_backend, set_backend])
def test_a_backend_that_cannot_run_says_why(force, monkeypatch):
    monkeypatch.setattr(backends.BACKENDS["materialised"], "unavailable", lambda: "no such device")
    with pytest.raises(ValueError, match=r"'materialised' cannot run here: no such device"):
        force("materialised")
    assert backends.current() == backends.Choice()
