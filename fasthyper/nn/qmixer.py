"""`QMixer`: torchrl's monotonic mixer of the values of agents, with mixing weights that are not written out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.functional import hyper_linear
from fasthyper.nn.linear import check_sizes
from fasthyper.nn.tracing import OneNode, is_proxy, recorded
from fasthyper.ops import shapes


class QMixer(OneNode):
    """Mix the values of agents to one value that grows with each of them: torchrl's QMixer.

    It computes, for a state s and the values q of n agents, ::

        hidden = elu(q abs(hyper_w_1(s)) + hyper_b_1(s))
        value = hidden abs(hyper_w_final(s)) + V(s)

    where the mixing weights ``abs(hyper_w_1(s))``, ``(n_agents, mixing_embed_dim)`` of each state, are not written out.
    Since they are not negative, the value never falls if a q grows. Parameters, state dict and results are those of
    ``torchrl.modules.QMixer``, which this class does not need.

    Args:
        state_shape: the shape of a state.
        mixing_embed_dim: the number of hidden features.
        n_agents: the number of agents.
        device: the device of the parameters.

    Shape:
        - chosen_action_value: ``(*, n_agents, 1)``.
        - state: ``(*, *state_shape)``.
        - Output: ``(*, 1)``.

    Attributes:
        hyper_w_1: an ``nn.Linear``, which generates the first weights, ``(n_agents, mixing_embed_dim)``.
        hyper_b_1: an ``nn.Linear``, which generates the first bias.
        hyper_w_final: an ``nn.Linear``, which generates the last weights, ``(mixing_embed_dim, 1)``.
        V: the network that computes the last bias.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is negative.

    References:
        Rashid et al., "QMIX: Monotonic Value Function Factorisation for Deep Multi-Agent Reinforcement Learning",
        ICML 2018, `arXiv 1803.11485 <https://arxiv.org/abs/1803.11485>`_.

    Example:
        >>> import torch
        >>> from fasthyper.nn import QMixer
        >>> mixer = QMixer(state_shape=(8, 8), mixing_embed_dim=32, n_agents=4)
        >>> q, state = torch.randn(16, 10, 4, 1, requires_grad=True), torch.randn(16, 10, 8, 8)
        >>> value = mixer(q, state)
        >>> value.shape
        torch.Size([16, 10, 1])
        >>> bool((torch.autograd.grad(value.sum(), q)[0] >= 0).all())
        True
    """

    def __init__(
        self,
        state_shape: Sequence[int],
        mixing_embed_dim: int,
        n_agents: int,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(state_shape, Sequence):
            raise TypeError(f"state_shape must be a tuple of sizes, got {state_shape!r}")
        sizes = {f"state_shape[{k}]": size for k, size in enumerate(state_shape)}
        check_sizes(mixing_embed_dim=mixing_embed_dim, n_agents=n_agents, **sizes)
        self.n_agents = n_agents
        self.device = device
        self.needs_state = True
        self.state_shape = torch.Size(state_shape)
        self.embed_dim = mixing_embed_dim
        self.state_dim = math.prod(state_shape)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, device=device)

        self.hyper_w_1 = linear(self.state_dim, mixing_embed_dim * n_agents)
        self.hyper_w_final = linear(self.state_dim, mixing_embed_dim)
        self.hyper_b_1 = linear(self.state_dim, mixing_embed_dim)
        self.V = nn.Sequential(linear(self.state_dim, mixing_embed_dim), nn.ReLU(), linear(mixing_embed_dim, 1))

    def forward(self, chosen_action_value: Tensor, state: Tensor) -> Tensor:
        """Return the mixed value, ``(*, 1)``.

        Args:
            chosen_action_value: the value of each agent's chosen action, ``(*, n_agents, 1)``.
            state: the state that all agents share, ``(*, *state_shape)``.

        Raises:
            TypeError: an argument is not a dense tensor of floating point numbers.
            ValueError: a shape does not fit.
        """
        if is_proxy(chosen_action_value):
            return recorded(self, chosen_action_value, state)
        for name, t in (("chosen_action_value", chosen_action_value), ("state", state)):
            shapes.check_input(name, t)
        rank = len(self.state_shape)
        if chosen_action_value.shape[-2:] != (self.n_agents, 1):
            raise ValueError(
                f"chosen_action_value must have shape (*, {self.n_agents}, 1), got {tuple(chosen_action_value.shape)}"
            )
        if state.dim() < rank or state.shape[state.dim() - rank :] != self.state_shape:
            expected = ", ".join(map(str, ("*", *self.state_shape)))
            raise ValueError(f"state must have shape ({expected}), got {tuple(state.shape)}")
        if state.shape[: state.dim() - rank] != chosen_action_value.shape[:-2]:
            raise ValueError(
                f"state must have the leading axes of chosen_action_value {tuple(chosen_action_value.shape)}, "
                f"got {tuple(state.shape)}"
            )
        return self.mix(chosen_action_value, state)

    def mix(self, chosen_action_value: Tensor, state: Tensor) -> Tensor:
        """Return the mixed value, ``(*, 1)``, as `forward` does, without its checks.

        Args:
            chosen_action_value: ``(*, n_agents, 1)``.
            state: ``(*, *state_shape)``.
        """
        q = chosen_action_value.reshape(-1, self.n_agents)
        state = state.reshape(q.shape[0], self.state_dim)
        hidden = F.elu(self._mixed(q, state, self.hyper_w_1, self.embed_dim) + self.hyper_b_1(state))
        value = self._mixed(hidden, state, self.hyper_w_final, 1) + self.V(state)
        return value.view(*chosen_action_value.shape[:-2], 1)

    @staticmethod
    def _mixed(x: Tensor, state: Tensor, head: nn.Linear, outputs: int) -> Tensor:
        """Return x abs(head(state)), in which the head generates weights (I, O)."""
        inputs = x.shape[1]
        weight = head.weight.view(inputs, outputs, -1).transpose(0, 1)
        return hyper_linear(x, state, weight, base_weight=head.bias.view(inputs, outputs).T, weight_map="abs")
