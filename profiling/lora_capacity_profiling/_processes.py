"""Ending a server with all that it started, whatever becomes of this process.

A server is started through a guard: this file, run as a script with the server's command. The guard leads a session of
its own and holds one end of a pipe. When the other end closes, because it was closed or because the process that held
it is gone (killed, crashed, its terminal closed), the guard ends everything that belongs to the session. It does so too
when the server dies by itself and leaves workers behind. So that it starts at once, this file imports nothing of the
project.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

POLL_S = 0.1
"""How often a wait looks again, seconds."""

_STATE, _PARENT, _SESSION, _START = 0, 1, 3, 19  # columns of /proc/PID/stat after the name
_SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h
_KILL_WAIT_S = 5.0  # a killed process is gone at once unless the kernel holds it, and then no wait helps


class Process(NamedTuple):
    """One process; its start distinguishes it from a later one of the same number.

    Attributes:
        pid: Its number.
        start_ticks: When it started, in the kernel's clock ticks since boot.
    """

    pid: int
    start_ticks: int


def identify(pid: int) -> Process:
    """Return a process by its number; a child of this one that has ended counts until it is waited for.

    Raises:
        OSError: If there is none.
    """
    return Process(pid, int(_stat(Path(f"/proc/{pid}"))[_START]))


def members(leader: Process) -> set[Process]:
    """Return the live processes that belong to a session leader: of its session, or descended from one of it.

    vLLM's own processes stay in the session; PyTorch's compile workers start sessions of their own. Zombies do not
    count.

    Args:
        leader: The session's leader, which may itself be gone.
    """
    return _belonging(leader, _snapshot())


def end(leader: Process, grace_s: float, on_wait: Callable[[float, int], None] | None = None) -> set[Process]:
    """End all processes of a session, politely at first, and wait until they are gone.

    Args:
        leader: The session's leader, ended last; this very process is spared.
        grace_s: Seconds between asking (SIGTERM) and forcing (SIGKILL).
        on_wait: Told, before each look, the seconds waited and how many processes are left.

    Returns:
        Those that could not be ended: none, but for processes that the kernel does not let go.
    """
    asked: set[Process] = set()
    started = time.monotonic()
    while True:
        alive = _snapshot()
        # One asked earlier may have lost the parent that tied it to the session.
        left = _belonging(leader, alive) | (asked & {process for _, _, process in alive.values()})
        left = {process for process in left if process.pid != os.getpid()}
        waited_s = time.monotonic() - started
        if not left or waited_s > grace_s + _KILL_WAIT_S:
            return left
        if on_wait is not None:
            on_wait(waited_s, len(left))
        force = waited_s >= grace_s
        # The leader last: while it lives, processes whose parent has just ended become its children and are found.
        targets = left - {leader} or left
        for process in targets if force else targets - asked:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGKILL if force else signal.SIGTERM)
        asked |= targets
        time.sleep(POLL_S)


def _snapshot() -> dict[int, tuple[int, int, Process]]:
    """Return parent, session and identity of every live process, by its number."""
    found = {}
    for entry in Path("/proc").iterdir():
        # A process may end between being listed and being read.
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                stat = _stat(entry)
                if stat[_STATE] not in "ZX":
                    pid = int(entry.name)
                    found[pid] = (int(stat[_PARENT]), int(stat[_SESSION]), Process(pid, int(stat[_START])))
    return found


def _stat(entry: Path) -> list[str]:
    # The name, in parentheses, may hold anything; the columns begin after it.
    return (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()


def _belonging(leader: Process, alive: dict[int, tuple[int, int, Process]]) -> set[Process]:
    if leader.pid in alive and alive[leader.pid][2] != leader:
        return set()  # a number is given out again only when nothing is left of its session
    inside = {pid for pid, (_, session, _) in alive.items() if leader.pid in (pid, session)}
    while grown := {pid for pid, (parent, _, _) in alive.items() if parent in inside} - inside:
        inside |= grown
    return {alive[pid][2] for pid in inside}


def guard(command: list[str], grace_s: float) -> int:
    """Run a command until it ends or standard input closes, then end the session; return the exit code.

    Args:
        command: Program and arguments; its standard input is empty, its outputs are this process's.
        grace_s: Seconds between SIGTERM and SIGKILL.
    """
    # Orphans become this process's children, so that even one with a session of its own still descends from here.
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while child.poll() is None:
        readable, _, _ = select.select([0], [], [], POLL_S)
        if readable and not os.read(0, 4096):
            break
    if os.getsid(0) == os.getpid():  # never end a session that is someone else's
        end(identify(os.getpid()), grace_s)
    code = child.poll()
    return 1 if code is None else code if code >= 0 else 128 - code


if __name__ == "__main__":
    try:
        sys.exit(guard(sys.argv[2:], float(sys.argv[1])))
    except OSError as failure:
        sys.exit(f"OSError: {failure}")
