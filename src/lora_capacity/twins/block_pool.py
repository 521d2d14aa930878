"""The KV blocks of one server as vLLM's prefix cache keeps them: plain Python, for the reference scheduler.

A block that is full gets a *key*, which stands for the tokens of its request up to its end and their adapter. Freed
blocks wait in a queue to be taken again, and keep their key until then: a request whose first tokens have the key finds
the block and need not compute them.

Source: ``BlockPool`` in ``vllm/v1/core/block_pool.py``, vLLM 0.8.5 to 0.33.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Key = tuple[str, int, int]
"""Whose tokens a block holds (``adapter`` or ``request``, and its number), and which block of theirs it is."""


@dataclass(eq=False)
class Block:
    """A KV block: its key once it is full, and how many requests hold it."""

    key: Key | None = None
    users: int = 0


class BlockPool:
    """Blocks that are held, and those that are free, next to be taken first."""

    def __init__(self, blocks: int, *, caching: bool, uncached_first: bool) -> None:
        """Begin with all blocks free.

        Args:
            blocks: How many there are.
            caching: Whether blocks get keys.
            uncached_first: Whether freed blocks without a key go to the front of the queue, not to its end.
        """
        self.caching, self.uncached_first = caching, uncached_first
        self.queue: OrderedDict[Block, None] = OrderedDict.fromkeys(Block() for _ in range(blocks))
        self.by_key: dict[Key, list[Block]] = {}

    @property
    def free(self) -> int:
        """How many blocks are free."""
        return len(self.queue)

    def find(self, keys: Iterable[Key]) -> list[Block]:
        """Return the blocks with these keys, up to the first key that no block has."""
        found: list[Block] = []
        for key in keys:
            if key not in self.by_key:
                break
            found.append(self.by_key[key][0])
        return found

    def hold(self, blocks: Sequence[Block]) -> None:
        """Let one more request hold blocks that were found."""
        for block in blocks:
            if block.users == 0:
                del self.queue[block]
            block.users += 1

    def take(self, count: int) -> list[Block]:
        """Take free blocks for one request; they lose what they held."""
        taken = [self.queue.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            if block.key is not None:
                self.by_key[block.key].remove(block)
                if not self.by_key[block.key]:
                    del self.by_key[block.key]
            block.key, block.users = None, 1
        return taken

    def keep(self, block: Block, key: Key) -> None:
        """Give a block its key, now that it is full."""
        if self.caching:
            block.key = key
            self.by_key.setdefault(key, []).append(block)

    def give_back(self, blocks: Sequence[Block]) -> None:
        """Let a request that leaves hold its blocks no more; the last of them is the first to be taken again."""
        freed: list[Block] = []
        for block in reversed(blocks):
            block.users -= 1
            if block.users == 0:
                freed.append(block)
                self.queue[block] = None
        if self.uncached_first:
            for block in reversed(freed):
                if block.key is None:
                    self.queue.move_to_end(block, last=False)
