"""What the balance of an interval consists of: who wants to run, who waits, what completes, what a step takes."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Bool, Float, Int


class Demand(NamedTuple):
    """The requests that want to run.

    Attributes:
        by_class: Those of each class, on average.
        total: All of them and the base model's, on average.
        fitting: Mean of what fits into the batch.
        overfull_share: Chance that they do not all fit.
    """

    by_class: Float[Array, "classes configs"]
    total: Float[Array, " configs"]
    fitting: Float[Array, " configs"]
    overfull_share: Float[Array, " configs"]


class Queue(NamedTuple):
    """The queue of an interval, and what leaves it.

    Attributes:
        waiting: Requests that wait at the end of the interval.
        mean_waiting: The same on average over the interval.
        clients_full: Whether clients hold all that ``max_pending`` lets them.
        batch_full_share: Share of the time in which the batch is full.
        completed_per_s: Requests completed per second.
    """

    waiting: Float[Array, " configs"]
    mean_waiting: Float[Array, " configs"]
    clients_full: Bool[Array, " configs"]
    batch_full_share: Float[Array, " configs"]
    completed_per_s: Float[Array, " configs"]


class Loads(NamedTuple):
    """The adapter loads of an interval.

    Attributes:
        loaded_once: Adapters loaded from disk by its end.
        per_s: Loads into slots per second.
        time_share: Share of the time that all loads take.
        reloads_per_s: Adapters read from disk again per second; None: host memory holds them all.
    """

    loaded_once: Float[Array, "classes configs"]
    per_s: Float[Array, " configs"]
    time_share: Float[Array, " configs"]
    reloads_per_s: Float[Array, "classes configs"] | None


class Step(NamedTuple):
    """A step: its time, its time without prompts, that of each prompt token, and the share that no request adds to."""

    time_s: Float[Array, " configs"]
    decode_s: Float[Array, " configs"]
    prompt_token_s: Float[Array, " configs"]
    fixed_share: Float[Array, " configs"]


class FirstToken(NamedTuple):
    """The time to first token of the requests that arrive in an interval.

    Attributes:
        prompt_s: Mean time from the admission on.
        prompt_variance_s2: Its variance.
        waiting_share: Share of the requests that wait for their admission.
        wait_s: Mean wait of those.
        wait_cv2: Squared coefficient of variation of their wait.
        slot_wait_s: Mean wait of all requests for a slot of their adapter.
    """

    prompt_s: Float[Array, "*shape"]
    prompt_variance_s2: Float[Array, "*shape"]
    waiting_share: Float[Array, "*shape"]
    wait_s: Float[Array, "*shape"]
    wait_cv2: Float[Array, "*shape"]
    slot_wait_s: Float[Array, "*shape"]

    @property
    def mean_s(self) -> Float[Array, "*shape"]:
        """Mean over all requests."""
        return self.prompt_s + self.waiting_share * self.wait_s


class Observed(NamedTuple):
    """What an interval tells of the server, to be averaged over the horizon."""

    running: Float[Array, " configs"]
    waiting: Float[Array, " configs"]
    completed_per_s: Float[Array, " configs"]
    first_token: FirstToken
    step_s: Float[Array, " configs"]
    active_adapters: Float[Array, " configs"]
    loads_per_s: Float[Array, " configs"]
    bottleneck: Int[Array, " configs"]
    batch_full_share: Float[Array, " configs"]
    class_completed_per_s: Float[Array, "classes configs"]
