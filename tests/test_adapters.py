"""Adapters of low rank that are given: values and derivatives against W written out, layouts, ids, memory."""

import pytest
import torch
import torch.nn.functional as F

import fasthyper
from fasthyper import Incidence, low_rank_linear
from fasthyper.backends.aten import groups

C, E, I, O, r = 5, 40, 6, 7, 3
IDS = {
    "any order": torch.tensor([3, 0, 3, 1, 0, 3, 3, 1, 3, 0] * 4),  # adapters 2 and 4 have no rows
    "sorted": torch.tensor([0] * 5 + [1] * 33 + [3] * 2),
    "equal runs": torch.arange(C).repeat_interleave(E // C),
    "one": torch.full((E,), 2),
}
LAYOUTS = ("rI,Or", "rI,rO", "Ir,Or", "Ir,rO")


def arguments(*points, rows=None, dtype=torch.float64):
    """Return x, a, b in PEFT's layout, the base weight and the base bias."""
    x = torch.randn(*((rows,) if rows is not None else (C, *points)), I, dtype=dtype)
    shapes = (C, r, I), (C, O, r), (O, I), (O,)
    return [t.requires_grad_() for t in (x, *(torch.randn(s, dtype=dtype) for s in shapes))]


def written_out(x, a, b, base_weight=None, base_bias=None, alpha=r, ids=None):
    W = alpha / a.shape[1] * b @ a
    W = W if base_weight is None else W + base_weight
    W = W if ids is None else W[ids]
    y = torch.einsum("boi,b...i->b...o", W, x)
    return y if base_bias is None else y + base_bias


def with_gradients(y, leaves):
    leaves = [t for t in leaves if t is not None]
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, leaves, torch.randn_like(y))]


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("base", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("points", [(), (2,), (2, 3), (0,)])
@pytest.mark.parametrize("alpha", [None, 7])
def test_an_adapter_for_each_instance(base, points, alpha):
    leaves = arguments(*points)
    leaves[3:] = [t if keep else None for t, keep in zip(leaves[3:], base, strict=True)]
    y = low_rank_linear(*leaves, alpha=alpha)
    assert y.shape == (C, *points, O)
    assert_same(with_gradients(y, leaves), with_gradients(written_out(*leaves, alpha or r), leaves))


@pytest.mark.parametrize("base", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("long", [1, 10**6])  # a product for each adapter, or padded
@pytest.mark.parametrize("room", [10**6, 100])  # rows in one block or in several
@pytest.mark.parametrize("narrow", [0, 128])  # the products of A with all adapters, side by side
def test_an_adapter_for_each_row(base, ids, long, room, narrow, monkeypatch):
    monkeypatch.setattr(groups, "_LONG", long)
    monkeypatch.setattr(groups, "_NARROW", narrow)
    monkeypatch.setattr(groups, "_room", lambda x: room)
    leaves = arguments(rows=E)
    leaves[3:] = [t if keep else None for t, keep in zip(leaves[3:], base, strict=True)]
    y = low_rank_linear(*leaves, alpha=5, incidence=Incidence.from_batch(ids))
    assert_same(with_gradients(y, leaves), with_gradients(written_out(*leaves, 5, ids), leaves))


def test_empty():
    x, a, b, base_weight, base_bias = arguments(rows=0)
    nothing = Incidence.from_batch(torch.zeros(0, dtype=torch.int64))
    y = low_rank_linear(x, a, b, base_weight, base_bias, incidence=nothing)
    assert y.shape == (0, O)
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), (a, b)))
    assert low_rank_linear(x, a[:0], b[:0], incidence=nothing).shape == (0, O)
    x = torch.randn(C, 0, dtype=torch.float64)
    assert not low_rank_linear(x, a[..., :0], b, layout="rI,Or").any()


@pytest.mark.parametrize(("long", "narrow"), [(1, 0), (10**6, 0), (1, 128)])
def test_infinity_stays_with_its_adapter(long, narrow, monkeypatch):
    monkeypatch.setattr(groups, "_LONG", long)
    monkeypatch.setattr(groups, "_NARROW", narrow)
    x, a, b, *_ = (t.detach() for t in arguments(rows=E))
    ids = IDS["any order"]
    a[3], b[3] = float("inf"), float("nan")
    a.requires_grad_()
    y = low_rank_linear(x, a, b, incidence=Incidence.from_batch(ids))
    assert torch.equal(y.isfinite().all(1), ids != 3)
    (d,) = torch.autograd.grad(y.sum(), a)
    assert torch.equal(d.isfinite().all((1, 2)), torch.arange(C) != 3)


# layouts


def laid_out(a, b, layout):
    of_a, of_b = layout.split(",")
    return (a if of_a == "rI" else a.mT.contiguous()), (b if of_b == "Or" else b.mT.contiguous())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", [False, True])
def test_every_layout(layout, given):
    x, a, b, *base = arguments(2)
    y = low_rank_linear(x, *laid_out(a, b, layout), *base, layout=layout if given else None)
    torch.testing.assert_close(y, written_out(x, a, b, *base))
    ids = torch.tensor([1, 4, 0])
    rows = x[:3, 0]
    y = low_rank_linear(rows, *laid_out(a, b, layout), *base, incidence=Incidence.from_batch(ids))
    torch.testing.assert_close(y, written_out(rows, a, b, *base, ids=ids))


def test_a_layout_is_required_where_several_fit():
    x, b = torch.randn(C, I), torch.randn(C, 4, I)
    square = torch.randn(C, I, I)  # r = I
    with pytest.raises(ValueError, match=r"layout must be given, one of 'rI,Or', 'Ir,Or'.*\(5, 6, 6\).*\(5, 4, 6\)"):
        low_rank_linear(x, square, b)
    torch.testing.assert_close(
        low_rank_linear(x, square, b, layout="Ir,Or"), torch.einsum("cor,cir,ci->co", b, square, x)
    )
    a, square = torch.randn(C, 3, I), torch.randn(C, 3, 3)  # O = r
    with pytest.raises(ValueError, match=r"one of 'rI,Or', 'rI,rO'"):
        low_rank_linear(x, a, square)
    torch.testing.assert_close(
        low_rank_linear(x, a, square, layout="rI,rO"), torch.einsum("cro,cri,ci->co", square, a, x)
    )
    # O is known from the base, and so is the layout of b
    a, b, base = torch.randn(C, 3, I), torch.randn(C, 3, 8), torch.randn(8, I)
    torch.testing.assert_close(low_rank_linear(x, a, b, base), written_out(x, a, b.mT, base))


# arguments


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"layout": "or"}, ValueError, "layout must be one of 'rI,Or', .*got 'or'"),
        ({"layout": "Ir,Or"}, ValueError, r"a must have shape \(5, 6, r\), got \(5, 3, 6\)"),
        ({"a": torch.randn(C, r, I + 1)}, ValueError, r"a must .*\(5, 3, 6\), got \(5, 3, 7\).*no other layout"),
        ({"a": torch.randn(C, r)}, ValueError, r"a must .*got \(5, 3\)"),
        ({"a": torch.randn(C + 1, r, I)}, ValueError, r"a must .*got \(6, 3, 6\)"),
        ({"b": torch.randn(C, O, r + 1)}, ValueError, r"b must .*got \(5, 7, 4\)"),
        ({"b": torch.randn(C + 1, O, r)}, ValueError, r"b must .*got \(6, 7, 3\)"),
        ({"base_weight": torch.randn(O + 1, I)}, ValueError, r"base_weight must .*got \(8, 6\)"),
        ({"base_bias": torch.randn(O + 1)}, ValueError, r"base_bias must .*got \(8,\)"),
        ({"a": torch.randn(C, r, I).double()}, TypeError, "a must have the dtype of x"),
        ({"b": None}, TypeError, "b must be a tensor, got None"),
        ({"x": torch.ones(C, I, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"x": 3}, TypeError, "x must be a tensor, got int"),
        ({"x": torch.randn(I)}, ValueError, r"x must .*got \(6,\)"),
        ({"alpha": 0}, ValueError, "alpha must be positive and finite, got 0"),
        ({"alpha": "1"}, TypeError, "alpha must be a number, got '1'"),
        ({"incidence": torch.arange(C)}, TypeError, r"incidence must be a fasthyper\.Incidence, got Tensor"),
        ({"incidence": Incidence(source=torch.arange(C))}, ValueError, "incidence must have cond"),
        (
            {"incidence": Incidence(cond=torch.arange(C), target=torch.arange(C))},
            ValueError,
            "incidence must have cond.*nothing else",
        ),
        (
            {"incidence": Incidence.from_batch(torch.tensor([0, 1, 2, 3, C]))},
            ValueError,
            "cond must have values .*to 4",
        ),
        ({"incidence": Incidence.from_batch(torch.arange(3))}, ValueError, r"cond must have shape \(5,\).*got \(3,\)"),
        ({"incidence": Incidence.from_batch(torch.arange(C), num_conds=9)}, ValueError, "a must have 9 adapters"),
    ],
)
def test_arguments_are_checked(changed, error, message):
    names = ("x", "a", "b", "base_weight", "base_bias")
    given = dict(zip(names, arguments(dtype=torch.float32), strict=True))
    with pytest.raises(error, match=message):
        low_rank_linear(**{**given, **changed})


# precision, transforms


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_errs_at_most_twice_as_much_as_w_written_out(dtype, by_id):
    shapes = (64, 48), (4, 8, 48), (4, 40, 8), (40, 48), (40,)
    x, a, b, w, bias = (torch.randn(s).mul_(s[-1] ** -0.5).to(dtype) for s in shapes)
    ids = torch.arange(64) % 4
    if by_id:
        y = low_rank_linear(x, a, b, w, bias, alpha=12, incidence=Incidence.from_batch(ids))
    else:
        ids = torch.arange(4).repeat_interleave(16)
        y = low_rank_linear(x.view(4, 16, 48), a, b, w, bias, alpha=12).flatten(0, 1)
    assert y.dtype == dtype
    truth = written_out(*(t.double() for t in (x, a, b, w, bias)), 12, ids)
    W = torch.baddbmm(w.expand(4, -1, -1), b, a, alpha=1.5)
    error = lambda t: (t.double() - truth).square().mean().sqrt()
    materialised = torch.bmm(W[ids], x[:, :, None])[..., 0] + bias
    assert error(y) <= 2 * error(materialised) + torch.finfo(dtype).eps * truth.square().mean().sqrt()


@pytest.mark.parametrize("long", [1, 10**6])
def test_sums_of_16_bits_are_rounded_once(long, monkeypatch):
    """The gradient of an adapter with many rows, in several blocks."""
    monkeypatch.setattr(groups, "_LONG", long)
    monkeypatch.setattr(groups, "_room", lambda x: 5000)
    x, g, ids = torch.ones(9000, 4).bfloat16(), torch.ones(9000, 3).bfloat16(), torch.arange(9000) % 2
    a = torch.zeros(2, 4, 3).bfloat16().requires_grad_()
    y = torch.ops.fasthyper.apply_groups(x, a, ids)
    (d,) = torch.autograd.grad(y, a, g)
    assert torch.equal(d, torch.full_like(d, 4500.0))


def by_ids(*args):
    return low_rank_linear(*args, alpha=5, incidence=Incidence.from_batch(torch.tensor([1, 0, 1, 3]), num_conds=C))


@pytest.mark.parametrize("by_id", [False, True])
def test_gradcheck(by_id):
    leaves = arguments(rows=4) if by_id else arguments(2)
    function = by_ids if by_id else lambda *args: low_rank_linear(*args, alpha=5)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("op", ["apply_groups", "weight_grad_groups"])
def test_opcheck(op):
    x, a, *_ = arguments(rows=4)
    ids = torch.tensor([1, 0, 1, 3])
    args = (x, a.mT, ids) if op == "apply_groups" else (x, torch.randn(4, 3, dtype=x.dtype, requires_grad=True), ids, C)
    torch.library.opcheck(getattr(torch.ops.fasthyper, op).default, args)


@pytest.mark.parametrize("by_id", [False, True])
def test_autocast(by_id):
    leaves = arguments(rows=4, dtype=torch.float32) if by_id else arguments(2, dtype=torch.float32)
    function = by_ids if by_id else low_rank_linear
    with torch.autocast("cpu", torch.bfloat16):
        y = function(*leaves)
        assert function(*(t.double() for t in leaves)).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), function(*leaves), rtol=0.05, atol=0.5)
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


@pytest.mark.parametrize("by_id", [False, True])
def test_compile(by_id):
    function = by_ids if by_id else lambda *args: low_rank_linear(*args, alpha=5)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = arguments(rows=4) if by_id else arguments(2)
    assert_same(with_gradients(compiled(*leaves), leaves), with_gradients(function(*leaves), leaves))


def test_compile_with_any_number_of_rows():
    compiled = torch.compile(low_rank_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 9):
        leaves, incidence = arguments(rows=rows), Incidence.from_batch(torch.arange(rows) % 3, num_conds=C)
        y = compiled(*leaves, incidence=incidence)
        expected = low_rank_linear(*leaves, incidence=incidence)
        assert_same(with_gradients(y, leaves), with_gradients(expected, leaves))


def test_export():
    class Adapted(torch.nn.Module):
        def forward(self, x, a, b, base_weight, base_bias, ids):
            incidence = Incidence.from_batch(ids)
            return low_rank_linear(x, a, b, base_weight, base_bias, alpha=5, incidence=incidence)

    leaves = [t.detach() for t in arguments(rows=4)]
    rows = torch.export.Dim("rows", min=2)
    shapes = ({0: rows}, None, None, None, None, {0: rows})
    program = torch.export.export(Adapted(), (*leaves, torch.tensor([1, 0, 1, 3])), dynamic_shapes=shapes)
    leaves, ids = [t.detach() for t in arguments(rows=9)], torch.arange(9) % C
    torch.testing.assert_close(program.module()(*leaves, ids), written_out(*leaves, 5, ids))


@pytest.mark.parametrize("batched", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("by_id", [False, True])
def test_vmap(batched, by_id):
    function = by_ids if by_id else lambda *args: low_rank_linear(*args, alpha=5)
    many = [[t.detach() for t in (arguments(rows=4) if by_id else arguments(2))] for _ in range(3)]
    args = [torch.stack(each) if k in batched else each[0] for k, each in enumerate(zip(*many, strict=True))]
    dims = tuple(0 if k in batched else None for k in range(5))
    expected = [function(*(t[v] if k in batched else t for k, t in enumerate(args))) for v in range(3)]
    torch.testing.assert_close(torch.func.vmap(function, dims)(*args), torch.stack(expected))


# memory


def test_no_row_has_a_copy_of_its_adapter():
    """A copy of A for each of 4,096 tokens would be 64 MiB, of B as much."""
    from fasthyper.measure import peak_temporary_bytes

    tokens, width = 4096, 512
    a, b = torch.randn(8, 8, width, requires_grad=True), torch.randn(8, width, 8, requires_grad=True)
    x = torch.randn(tokens, width, requires_grad=True)
    incidence = Incidence.from_batch(torch.randint(8, (tokens,)))
    step = lambda: torch.autograd.grad(low_rank_linear(x, a, b, incidence=incidence).sum(), (x, a, b))
    step()
    fasthyper.set_workspace_limit(1 << 20)
    # the result and the gradient of it are 8 MiB each
    assert peak_temporary_bytes(step) < 20 << 20


def test_as_the_loop_over_adapters():
    """PEFT's way for mixed adapters: the rows of each adapter are taken, and added to the result."""
    x, a, b, w, bias = arguments(rows=E)
    ids = IDS["any order"]
    expected = F.linear(x, w, bias)
    for c in ids.unique():
        rows = (ids == c).nonzero()[:, 0]
        expected = expected.index_add(0, rows, 2 * (x[rows] @ a[c].T) @ b[c].T)
    y = low_rank_linear(x, a, b, w, bias, alpha=2 * r, incidence=Incidence.from_batch(ids))
    torch.testing.assert_close(y, expected)
