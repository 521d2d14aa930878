"""How long an adapter keeps its slot: the busy period of an M/G/∞ queue, for any distribution of output lengths."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float

from lora_capacity.workload import LengthDistribution, Workload

_NODES = 8
"""Quadrature nodes: with eight, busy periods are right to 1 %, and to 3 % where lengths have steps (unit tests)."""

MAX_LOAD = 25.0
"""Mean requests running above which a busy period counts as endless: ``e^25`` stays outlast any horizon."""


@struct.dataclass
class ResidenceTime:
    """Distribution of a request's residence in the batch, in units of its mean, at quadrature nodes.

    A request stays for as many steps as it has output tokens, so residence is distributed as the output length. Each
    field is ``[nodes]``, or ``[nodes, configs]`` where configurations have lengths of their own.

    Attributes:
        finished: Share of the requests that have left by the node's time, ``F(t)``.
        remaining: Mean time a request still has beyond the node's time, over all requests (1 at time 0).
        weight: Quadrature weight of the node.
    """

    finished: Array
    remaining: Array
    weight: Array

    @classmethod
    def of(cls, traffic: "Workload | LengthDistribution | ResidenceTime") -> "ResidenceTime":
        """Return the residence times of a workload's requests, or of requests of such output lengths."""
        if isinstance(traffic, ResidenceTime):
            return traffic
        return cls.of_lengths(traffic.output_tokens if isinstance(traffic, Workload) else traffic)

    @classmethod
    def of_lengths(cls, lengths: LengthDistribution) -> "ResidenceTime":
        """Tabulate residence times that are proportional to ``lengths``.

        Integrals over time become integrals over the remaining time, which falls from 1 to 0 at the rate ``1 − F``.
        Nodes are Gauss-Legendre points in its square root: the last requests to leave, of which there are few, take
        long.
        """
        points, weights = np.polynomial.legendre.leggauss(_NODES)
        root = 0.5 * (points + 1.0)
        present = 1.0 - np.concatenate([[0.0], np.cumsum(lengths.probability[:-1])])
        left = np.cumsum(present * np.diff(lengths.tokens, prepend=0) / lengths.mean)
        step = np.minimum(np.searchsorted(left, 1.0 - root**2), present.size - 1)
        columns: Any = (1.0 - present[step], root**2, weights * root / present[step])
        return cls(*(values.astype(jax.dtypes.canonicalize_dtype(float)) for values in columns))

    @property
    def cv2(self) -> Array:
        """Squared coefficient of variation, a number or ``[configs]``: ``E[t²] = 2 ∫ remaining(t) dt``."""
        return 2.0 * (self.weight * self.remaining).sum(axis=0) - 1.0

    @property
    def overlap(self) -> Array:
        """Twice the mean time that two stays have in common which begin together, ``2 ∫ (1 − F(t))² dt``."""
        return 2.0 * (self.weight * (1.0 - self.finished) ** 2).sum(axis=0)

    def busy_period(self, load: Float[Array, "*shape"], backlog: Float[Array, "*shape"] | None = None) -> Array:
        """Mean time until an M/G/∞ queue is empty that starts with ``1 + Poisson(backlog)`` requests.

        ``∫₀^∞ e^{load · remaining(t)} (1 − F(t) e^{−backlog (1 − F(t))}) dt``, with ``F`` the share finished. It
        takes the requests present at the start as newly begun. Without a backlog it is ``(e^load − 1) / load``.

        Args:
            load: Mean requests running, arrival rate times mean residence; any shape. Above 25 it counts as 25.
            backlog: Mean requests waiting at the start besides the first, same shape; none if not given.

        Returns:
            Mean residence times, same shape.

        Source: renewal argument. The chance of being empty at ``t`` is ``e^{−load (1 − remaining(t))}`` from empty and
        ``F(t)^k`` times that from ``k`` requests; the difference, integrated and divided by the chance of being empty
        in the long run, ``e^{−load}``, is the mean first passage. Without a backlog: Takács, Introduction to the
        Theory of Queues (1962).
        """
        load = jnp.minimum(load, MAX_LOAD)
        total = jnp.zeros_like(load)
        for node in range(self.weight.shape[0]):
            busy = 1.0 - self.finished[node]
            if backlog is not None:
                busy = 1.0 - self.finished[node] * jnp.exp(-backlog * busy)
            total = total + self.weight[node] * busy * jnp.exp(load * self.remaining[node])
        return total

    def drain(self, backlog: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Mean time until ``1 + Poisson(backlog)`` requests have left, when none joins them; mean residence times."""
        total = jnp.zeros_like(backlog)
        for node in range(self.weight.shape[0]):
            finished = self.finished[node]
            total = total + self.weight[node] * (1.0 - finished * jnp.exp(-backlog * (1.0 - finished)))
        return total
