"""A Ray cluster that does the work: tasks of `run_tasks` on the cores of its nodes, which may come and go."""

import contextlib
import functools
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from lora_capacity.errors import ClusterError, InputError, LoraCapacityError
from lora_capacity.run.cache import keep_compiled_code
from lora_capacity.run.checkpoint import package_version
from lora_capacity.run.resources import available_cores
from lora_capacity.run.tasks import ELSEWHERE, MOST_THREADS

_ALLOWED = "local, auto, or HOST:PORT of the head of a Ray cluster that this machine is a node of"

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": ".", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""What Ray is told by the environment: to report nothing to its makers, and to print nothing into our answers."""

_RETRIES = 20
"""How often a task is begun again whose worker died: many nodes may go, but a task that kills its worker has an end."""

_LOOK_S, _LOOKS = 1.0, 5
"""Time between two looks at the cluster; and after how many in a row without an answer of its head it is lost."""

_CONNECT_S = 5.0
"""Longest wait for an address to answer; Ray itself waits for two minutes."""

_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a client says first: the preface, and its settings, none. A server says its own (RFC 9113, section 3.4)."""


@contextlib.contextmanager
def on_ray(address: str) -> Iterator[None]:
    """Let a Ray cluster do what is run until the block ends; this process cuts the work up and keeps what comes back.

    `simulate`, the event twin of `lora_capacity.validation` and of `lora_capacity.fleet.place`, and
    `lora_capacity.surrogate.label` share their work out, a core a task. The answers are those of this machine's CPU, to
    the bit where processors are alike. Nodes may come and go: what a lost one did is done again by others. Every node
    needs the same version of lora-capacity.

    Args:
        address: ``local`` starts Ray on this machine's cores; ``auto`` finds the cluster that this machine is a node
            of; or that cluster's head, ``HOST:PORT``.

    Raises:
        InputError: If Ray is not installed, no cluster answers there, or JAX does not run on the CPU.
        ClusterError: Within the block, if the cluster is lost. Folders of finished work stay, to go on from.
    """
    if jax.default_backend() != "cpu":
        raise InputError("ray", address, "JAX on the CPU, as on the cluster", "set JAX_PLATFORMS=cpu")
    cluster = _Cluster(_connected(address))
    token = ELSEWHERE.set(cluster.run)
    try:
        yield
    finally:
        ELSEWHERE.reset(token)
        cluster.ray.shutdown()


def _connected(address: str) -> Any:
    """Return Ray, connected to a cluster, and quiet."""
    os.environ.update(_QUIET)
    try:
        import ray
    except ImportError:
        raise InputError("ray", address, "with Ray installed", "pip install 'lora-capacity[ray]'") from None
    how: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        how |= {"num_cpus": available_cores(), "num_gpus": 0, "include_dashboard": False}
    elif address != "auto" and not _answers(address):
        raise InputError("ray", address, _ALLOWED, "no head of a cluster answers there")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "os.fork")  # by JAX: what Ray starts runs another program at once
            ray.init(**how)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise InputError("ray", address, _ALLOWED, _first_line(error)) from None
    return ray


def _answers(address: str) -> bool:
    """Say whether what listens at an address speaks HTTP/2, as Ray's head does, and few others do."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise InputError("ray", address, _ALLOWED)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":  # it waits for a certificate first
                return True
            connection.sendall(_HTTP2_GREETING)
            return connection.recv(9)[3:4] == _HTTP2_GREETING[-6:-5]
    except (OSError, OverflowError):
        return False


class _Cluster:
    """A cluster that this process is connected to.

    Args:
        ray: Ray, connected.
    """

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        self._head = ray.get_runtime_context().gcs_address
        self._alive: set[str] = set()
        self._silent = 0
        self._told_of_none = False

    def run(
        self, task: Callable[[Any], Any], items: Sequence[Any], finished: Callable[[Any], None], together: int
    ) -> list[Any]:
        """Run tasks as `run_tasks` does."""
        groups = [items[start : start + together] for start in range(0, len(items), together)]
        known = self.ray.put(task)
        remote = self.ray.remote(num_cpus=1, max_retries=_RETRIES)(_answers_of)
        number = {remote.remote([known], package_version(), group): i for i, group in enumerate(groups)}
        answers: dict[int, list[Any]] = {}
        waiting = list(number)
        try:
            while waiting:
                ended, waiting = self.ray.wait(waiting, num_returns=len(waiting), timeout=_LOOK_S)
                for each in ended:
                    answers[number[each]] = self._got(each)
                    for answer in answers[number[each]]:
                        finished(answer)
                if waiting:
                    self._look()
        except BaseException as error:
            if not isinstance(error, ClusterError):
                for each in waiting:
                    self.ray.cancel(each)
            raise
        return [answer for i in range(len(groups)) for answer in answers[i]]

    def _got(self, answer: Any) -> list[Any]:
        errors = self.ray.exceptions
        try:
            return list(self.ray.get(answer))
        except errors.RayTaskError as error:
            if isinstance(error.cause, LoraCapacityError):
                raise error.cause from None
            raise
        except errors.RayError as error:
            raise ClusterError(f"Ray: {_first_line(error)}") from None

    def _look(self) -> None:
        """See that the cluster is still there, and tell of nodes that are not."""
        self._silent = 0 if _answers(self._head) else self._silent + 1
        if self._silent >= _LOOKS:
            raise ClusterError(f"the Ray cluster is lost: its head at {self._head} does not answer any more")
        if self._silent:
            return
        nodes = self.ray.nodes()
        alive = {node["NodeID"] for node in nodes if node["Alive"]}
        if lost := len(self._alive - alive):
            _warn(f"{lost} of {len(self._alive)} nodes of the Ray cluster lost: others do again what they had begun")
        self._alive = alive
        cores = any(node["Alive"] and node["Resources"].get("CPU") for node in nodes)
        if not cores and not self._told_of_none:
            _warn("no node of the Ray cluster has a core: waiting for one that has")
        self._told_of_none = not cores


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _answers_of(known: Sequence[Any], version: str, items: Sequence[Any]) -> list[Any]:
    """Answer on a worker: a task, in a list so that Ray does not fetch it every time, for some items.

    Raises:
        InputError: If this node has another version than whoever asks.
    """
    if package_version() != version:
        raise InputError("ray", f"a node with lora-capacity {package_version()}", f"{version} on all, as here")
    _prepare()
    return [_task(known[0])(item) for item in items]


@functools.cache
def _prepare() -> None:
    """Use one core of this node, and what others on it have compiled."""
    config: Any = jax.config
    config.update("jax_platforms", "cpu")
    MOST_THREADS.set(1)
    keep_compiled_code()


@functools.lru_cache(maxsize=1)
def _task(known: Any) -> Callable[[Any], Any]:
    """Fetch a task once for all the items that this worker gets, with what it remembers from one to the next."""
    import ray

    task: Callable[[Any], Any] = ray.get(known)
    return task
