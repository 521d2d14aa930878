"""Which adapters a step needs, and which of them have to be brought into host memory and onto the GPU: LRU eviction.

A step touches its adapters in ascending order. Whoever was needed by the step before is more recently used than anybody
who was not, so only *newcomers* can be missing, and those that they push out before a step has touched them.

Source: ``vllm/lora/worker_manager.py`` and the LRU lists of ``vllm/lora/models.py``, vLLM 0.8.5.
"""

from typing import Any

import numpy as np

from lora_capacity.twins.compiled.jit import compiled
from lora_capacity.twins.compiled.state import GPU, HOST, Server


@compiled
def need(s: Server, adapter: int) -> None:
    """Count one more request of the step that needs an adapter."""
    use, n = s.adapters, s.numbers[0]
    if adapter == use.size - 1:
        return
    use[adapter].need += 1
    if use[adapter].need > 1:
        return
    if n.held > 0 and use[adapter].held_at == n.step - 1:
        n.held -= 1
        use[adapter].held_at = -1
    else:
        n.eligible += use[adapter].queued
    use[adapter].place, use[n.active].active = n.active, adapter
    n.active += 1
    if use[adapter].last_use < n.step - 1:
        use[adapter].since = n.step
        use[n.newcomers].to_touch = adapter
        n.newcomers += 1


@compiled
def need_no_more(s: Server, adapter: int, last_use: int) -> bool:
    """Count one request less; say whether it was the only one, so that the adapter was last needed by a given step."""
    use, n = s.adapters, s.numbers[0]
    if adapter == use.size - 1:
        return False
    use[adapter].need -= 1
    if use[adapter].need > 0:
        return False
    use[adapter].last_use = last_use
    n.active -= 1
    moved, at = use[n.active].active, use[adapter].place
    use[at].active, use[moved].place = moved, at
    return True


@compiled
def hold_slot(s: Server, adapter: int) -> None:
    """Let an adapter that the next step does not need keep its slot until the answers of this one have come."""
    use, n = s.adapters, s.numbers[0]
    use[n.held].held, use[adapter].held_at = adapter, n.step
    n.held += 1
    if n.held < use.size:
        use[n.held].held = -1


@compiled
def release_held(s: Server) -> None:
    """Let nobody be held any more but by the step that is put together."""
    use, n = s.adapters, s.numbers[0]
    if n.held == 0:
        return
    for i in range(use.size):
        adapter = use[i].held
        if adapter < 0:
            break
        if use[adapter].held_at == n.step - 1:
            n.eligible -= use[adapter].queued
            use[adapter].held_at = -1
    n.held = 0


@compiled
def load(s: Server) -> tuple[int, int, float]:
    """Touch the newcomers of a step.

    Returns:
        Adapters copied from host memory to the GPU, those read from disk, and seconds for reading these.
    """
    use, n = s.adapters, s.numbers[0]
    host_loads, disk_loads, disk_s = 0, 0, 0.0
    _sort_newcomers(s)
    at = 0
    while at < n.newcomers:
        adapter = use[at].to_touch
        at += 1
        # Constants would have the functions below compiled for each.
        if _bring(s, np.int64(HOST), adapter, at):
            disk_loads += 1
            disk_s += use[adapter].disk_s
        host_loads += _bring(s, np.int64(GPU), adapter, at)
    return host_loads, disk_loads, disk_s


@compiled
def _bring(s: Server, tier: Any, adapter: int, at: int) -> bool:
    """Bring an adapter onto a tier unless it is there; say whether it had to be.

    The least recently used one makes room: one that leaves host memory leaves the GPU too.
    """
    n, members, count = s.numbers[0], s.tiers[tier], s.loaded[tier]
    if members[adapter].place >= 0:
        return False
    if count == (n.max_loras if tier == GPU else n.max_cpu_loras):
        evicted = _least_recent(s, tier, adapter)
        for each in range(tier + 1):
            _drop(s, each, evicted)
        _touch_again(s, evicted, adapter, at)
        count -= 1
    members[adapter].place, members[count].adapter = count, adapter
    s.loaded[tier] = count + 1
    return True


@compiled
def _sort_newcomers(s: Server) -> None:
    """Sort the newcomers; they are few."""
    use = s.adapters
    for i in range(1, s.numbers[0].newcomers):
        value, at = use[i].to_touch, i
        while at > 0 and use[at - 1].to_touch > value:
            use[at].to_touch = use[at - 1].to_touch
            at -= 1
        use[at].to_touch = value


@compiled
def _last_touch(s: Server, adapter: int, now: int) -> int:
    """Return the step that touched an adapter last, while the step put together has come to another one."""
    use, step = s.adapters, s.numbers[0].step
    if use[adapter].need == 0:
        return int(use[adapter].last_use)
    if adapter < now:
        return int(step)
    return int(use[adapter].last_use) if use[adapter].since == step else int(step) - 1


@compiled
def _least_recent(s: Server, tier: int, now: int) -> int:
    """Return the least recently used adapter of a tier."""
    best, best_touch = -1, 0
    for i in range(s.loaded[tier]):
        adapter = s.tiers[tier, i].adapter
        touch = _last_touch(s, adapter, now)
        if best < 0 or touch < best_touch or (touch == best_touch and adapter < best):
            best, best_touch = adapter, touch
    return best


@compiled
def _drop(s: Server, tier: int, adapter: int) -> None:
    """Take an adapter off a tier if it is there."""
    members, at = s.tiers[tier], s.tiers[tier, adapter].place
    if at < 0:
        return
    s.loaded[tier] -= 1
    moved = members[s.loaded[tier]].adapter
    members[at].adapter, members[moved].place = moved, at
    members[adapter].place = -1


@compiled
def _touch_again(s: Server, evicted: int, now: int, at: int) -> None:
    """Let an evicted adapter be loaded again that the step needs and has not touched yet."""
    use, n = s.adapters, s.numbers[0]
    if use[evicted].need == 0 or evicted < now:
        return
    place = at
    while place < n.newcomers and use[place].to_touch < evicted:
        place += 1
    if place < n.newcomers and use[place].to_touch == evicted:
        return
    for i in range(n.newcomers, place, -1):
        use[i].to_touch = use[i - 1].to_touch
    use[place].to_touch = evicted
    n.newcomers += 1
