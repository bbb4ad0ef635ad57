"""A Hypernetwork under ``torch.fx``."""

from __future__ import annotations

from typing import Any

from fasthyper.nn.current_z import deliver
from fasthyper.nn.tracing import call_of, proxy_of


def record_network(network: Any, x: Any, cond: Any, args: Any, incidence: Any, kwargs: Any) -> Any:
    """Record the call of a Hypernetwork: one node, or the nodes of trunk and primary if fx traces the network itself.

    Args:
        network: the Hypernetwork whose forward runs.
        x: its first argument, or ``...`` where the caller passed it by its name in the primary.
        cond: as in its forward.
        args: as in its forward; one proxy where fx traces the network itself.
        incidence: as in its forward.
        kwargs: as in its forward.

    Returns:
        The proxy of the result.
    """
    if not isinstance(args, tuple):  # one proxy for all arguments that a caller might add
        args, kwargs = (), {}
    tracer = proxy_of(x, cond, *kwargs.values()).tracer
    if tracer.root is not network:
        given: dict[str, Any] = {"cond": cond, **kwargs} if x is ... else dict(kwargs)
        if incidence is not None:
            given["incidence"] = incidence
        return call_of(network, tracer, () if x is ... else (x, cond, *args), given)
    z = network.trunk(cond)
    with deliver(network._z_by_layer(z) if isinstance(z, dict) else z, incidence, network.repeat_z):
        return network.primary(*(() if x is ... else (x, *args)), **kwargs)
