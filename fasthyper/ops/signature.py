"""`Signature`: the names, types and axes of an op, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

from torch import Tensor

from . import shapes

Op = Callable[..., Any]

_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    int: "SymInt",
    bool: "bool",
    list[int]: "SymInt[]",
}


class Signature:
    """The names, types and axes of an op, and what follows from them: schema, check of arguments, shapes of results."""

    def __init__(
        self, name: str, arguments: Any, results: Mapping[str, str], axes: shapes.Axes, validate: Op | None
    ) -> None:
        self.name, self.arguments, self.results, self.axes, self.validate = name, arguments, results, axes, validate
        self.types = get_type_hints(arguments)
        self.masked = "mask" in self.types
        self.tensors = [
            field
            for field, annotation in self.types.items()
            if annotation in (Tensor, Tensor | None) and field not in shapes.INDICES
        ]
        self.optional = [field for field in self.tensors if self.types[field] != Tensor]

    def schema(self) -> str:
        arguments = []
        for field, annotation in self.types.items():
            text = f"bool[{len(self.results)}]" if field == "mask" else _SCHEMA[annotation]
            arguments.append(f'{text} {field}=""' if field in ("backend", "schedule") else f"{text} {field}")
        returns = ["Tensor" if self.masked else f"Tensor {result}" for result in self.results]
        returned = "Tensor" if len(returns) == 1 else f"({', '.join(returns)})"
        return f"{self.name}({', '.join(arguments)}) -> {returned}"

    def check(self, values: Sequence[Any]) -> Any:
        """Check the arguments of a call; return them as their named tuple."""
        args = self.arguments(*values)
        given = self.given(args)
        if not shapes.agree(self.axes, given, self.optional):
            shapes.check(self.axes, given, self.optional)
        if self.masked and len(args.mask) != len(self.results):
            raise ValueError(
                f"mask must have {len(self.results)} entries, one for each gradient, got {list(args.mask)}"
            )
        if self.validate is not None:
            self.validate(args)
        return args

    def with_check(self, run: Op | None) -> Op:
        """Return a function of the op's arguments that checks them and calls `run` with their named tuple."""

        def call(*values: Any) -> Any:
            args = self.check(values)
            out = run(args)  # type: ignore[misc]
            return out if len(self.results) == 1 else tuple(args.x.new_empty(0) if t is None else t for t in out)

        return call

    def refuse(self, *values: Any) -> None:
        """Raise for tensors that are not dense."""
        shapes.check(self.axes, self.given(self.arguments(*values)), self.optional)

    def with_check_of_one(self, vmap: Op) -> Op:
        """Return a rule of vmap that first checks the arguments as one call of the batch has them."""

        def rule(info: Any, dims: Sequence[Any], *values: Any) -> Any:
            dims = [d if isinstance(t, Tensor) else None for t, d in zip(values, dims, strict=True)]
            self.check([t if d is None else _one_of(t, d) for t, d in zip(values, dims, strict=True)])
            return vmap(info, dims, *values)

        return rule

    def given(self, args: Any) -> dict[str, Tensor | None]:
        return {field: getattr(args, field) for field in self.tensors}

    def empty(self, args: Any) -> Any:
        """Return results of the right shapes with no values."""
        sizes = shapes.sizes_of(self.axes, {field: t.shape for field, t in self.given(args).items() if t is not None})
        sizes.update({letter: getattr(args, field) for field, letter in shapes.COUNTS.items() if field in self.types})
        wanted = args.mask if self.masked else [True] * len(self.results)
        out = [
            args.x.new_empty(shapes.shape_of(letters, sizes)) if k else None
            for letters, k in zip(self.results.values(), wanted, strict=True)
        ]
        return out[0] if len(out) == 1 else tuple(out)


def _one_of(t: Tensor, dim: int) -> Tensor:
    """Return one of the tensors that vmap has batched along a dimension; an empty one of its shape if there is none."""
    if t.shape[dim]:
        return t.select(dim, 0)
    dim %= t.dim()
    return t.new_empty([*t.shape[:dim], *t.shape[dim + 1 :]])
