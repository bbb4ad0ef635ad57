"""The z of activation checkpoints inside a primary, noted in the forward and found in the recomputation.

With ``use_reentrant=False`` the recomputed layer takes the z of the forward; the gradient flows through the graph of
the forward. With ``use_reentrant=True`` the graph of the forward does not have z, because torch records the arguments
of the checkpointed function alone, and each recomputation has a backward pass of its own. There the layer takes a leaf
in the place of z. A hook on z adds what the leaves of a pass received to z's own gradient. The engine runs the nodes
that are ready in the reverse order of the forward, so that the checkpoints come first. If a leaf receives its gradient
later, or if nothing else needs z's gradient, the end of the pass gives it to z.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper.incidence import Incidence
from fasthyper.ops import checkpoints


class Given:
    """What one `deliver` block gave to checkpoints."""

    def __init__(self, z: Tensor | Mapping[nn.Module, Any], incidence: Incidence | None, repeat: bool) -> None:
        self.z, self.incidence, self.repeat = z, incidence, repeat
        self.versions = {id(t): checkpoints.version(t) for t in _tensors(z)}
        self.reentrant = False
        self._collectors: dict[int, _Collector] = {}

    def collector(self, z: Tensor) -> _Collector:
        found = self._collectors.get(id(z))
        if found is None:
            found = self._collectors[id(z)] = _Collector()
            z.register_hook(found.add_to)
        return found

    def expect_leaves(self) -> None:
        """Prepare z for gradients from recomputations with a backward pass of their own."""
        if not self.reentrant:
            self.reentrant = True
            for z in _tensors(self.z):
                if z.requires_grad:
                    self.collector(z)

    def tied(self, y: Any) -> Any:
        """Return y, such that its backward pass reaches z if checkpoints with `use_reentrant=True` need that."""
        needed = [t for t in _tensors(self.z) if t.requires_grad] if self.reentrant else []
        if not (needed and torch.is_grad_enabled()):
            return y
        if isinstance(y, Tensor):
            return _Tie.apply(y, *needed) if y.requires_grad else y
        if type(y) in (tuple, list):
            return type(y)(self.tied(t) for t in y)
        return y


class _Note:
    """What a checkpoint took, and the pass that collects its gradients: None for the one that recomputes it."""

    def __init__(self, given: Given, pass_id: int | None) -> None:
        self.given, self.pass_id = given, pass_id

    def leaf_of(self, z: Tensor) -> Tensor:
        """Return a leaf in the place of z, whose gradient goes to z."""
        if not z.requires_grad:
            return z
        collector, pass_id = self.given.collector(z), self.pass_id
        if pass_id is None:
            pass_id = checkpoints.backward_id()
            collector.expect(pass_id, z)
        leaf = z.detach().requires_grad_()
        leaf.register_hook(collector.receiver(pass_id))
        return leaf


class _Collector:
    """Collects the gradients of the leaves of one z, by backward pass. It does not refer to z, whose hook it is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[int, Tensor] = {}
        self._expected: set[int] = set()

    def receiver(self, pass_id: int) -> Callable[[Tensor], None]:
        def receive(g: Tensor) -> None:
            with self._lock:
                before = self._sums.get(pass_id)
                self._sums[pass_id] = g if before is None else before + g

        return receive

    def add_to(self, g: Tensor | None) -> Tensor | None:
        """Return z's own gradient and what was collected in the running pass, or None to change nothing.

        A pass for some inputs alone may leave out the checkpoints: torch raises only if it does not.
        """
        if not checkpoints.computes_all():
            raise RuntimeError(
                "z reaches layers in checkpoints with use_reentrant=True, so its gradient needs .backward() without "
                "`inputs`; for autograd.grad, pass use_reentrant=False to the checkpoint"
            )
        with self._lock:
            collected = None if g is None else self._sums.pop(checkpoints.backward_id(), None)
        return None if g is None or collected is None else g + collected

    def expect(self, pass_id: int, z: Tensor) -> None:
        """See to it that what is still collected at the end of a pass reaches z."""
        with self._lock:
            if pass_id in self._expected:
                return
            self._expected.add(pass_id)
        keep = checkpoints.keeps_graph()

        def finish() -> None:
            with self._lock:
                self._expected.discard(pass_id)
                left = self._sums.pop(pass_id, None)
            if left is None:
                return
            try:
                torch.autograd.backward(z, left, retain_graph=keep)
            except RuntimeError as error:
                raise RuntimeError(
                    "the gradient of z from checkpoints with use_reentrant=True came too late: the graph that computed "
                    "z was already used in this backward pass. Pass use_reentrant=False to the checkpoint."
                ) from error

        checkpoints.at_the_end_of_backward(finish)


class _Tie(torch.autograd.Function):
    """Return y, and send zeros to some tensors, so that the backward pass reaches them."""

    @staticmethod
    def forward(ctx, y, *tensors):
        ctx.like = [(t.shape, t.dtype, t.device) for t in tensors]
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g):
        return g, *(torch.zeros((), dtype=d, device=device).expand(s) for s, d, device in ctx.like)


def note(running: list[Any], given: Given, pass_id: int | None = None) -> None:
    """Note on checkpoints whose forward runs what their layers take."""
    for checkpoint in running:
        known: Any = getattr(checkpoint, "_fasthyper", _UNKNOWN)
        if known is _UNKNOWN:
            checkpoint._fasthyper = _Note(given, pass_id)
        elif known is not None and known.given is not given:
            checkpoint._fasthyper = None  # two blocks within one checkpoint that began outside of it: an error later
        if checkpoints.is_reentrant(checkpoint):
            given.expect_leaves()


_UNKNOWN = object()


def recomputed_z(recomputed: Any, running: list[Any], of_layer: Callable[[Any], Any]) -> tuple[Any, Given] | None:
    """Return the z of a layer in a checkpoint that is recomputed, and what it belongs to; None if nothing was noted.

    Args:
        recomputed: the checkpoint, or None.
        running: checkpoints inside of it whose forward runs again, which take the same.
        of_layer: returns the z of the layer from that of the block.

    Raises:
        RuntimeError: z was changed in place since the forward.
    """
    known = getattr(recomputed, "_fasthyper", None)
    if known is None:
        return None
    given, reentrant = known.given, checkpoints.is_reentrant(recomputed)
    pass_id = known.pass_id
    if reentrant and pass_id is None:
        pass_id = checkpoints.backward_id()
    note(running, given, pass_id)
    z = of_layer(given.z)
    for t in _tensors(z):
        if checkpoints.version(t) != given.versions.get(id(t)):
            raise RuntimeError(
                "z was changed in place between the forward and the recomputation of an activation checkpoint inside "
                "the primary"
            )
    if reentrant:
        z = tuple(map(known.leaf_of, z)) if isinstance(z, tuple) else z if z is None else known.leaf_of(z)
    return z, given


def _tensors(z: Any) -> list[Tensor]:
    if isinstance(z, Tensor):
        return [z]
    if isinstance(z, Mapping):
        return [t for value in z.values() for t in _tensors(value)]
    return list(z or ())
