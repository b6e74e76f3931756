"""This process among those that torchrun started."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from kdcache.errors import NotBuilt, UsageError


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among those that torchrun started; (0, 1, 0) without it."""

    rank: int
    world: int
    local: int

    def share(self, shards: Iterable[int]) -> list[int]:
        """This rank's part of the missing shards.

        By shard number, not by place in the list: ranks look at different moments, when others have
        written some.
        """
        return [shard for shard in shards if shard % self.world == self.rank]


def this_rank() -> Rank:
    """From RANK, WORLD_SIZE and LOCAL_RANK; no process group is needed. UsageError for what is no
    number.
    """
    found = []
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = os.environ.get(name) or str(default)
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise UsageError(
                f"the environment has {name}={text[:40]!r}; expected a number, as torchrun sets it"
            )
        found.append(int(text))
    if found[0] >= found[1]:
        raise UsageError(
            f"the environment has RANK={found[0]}, WORLD_SIZE={found[1]}; expected RANK below "
            "WORLD_SIZE"
        )
    return Rank(*found)


def refuse_ranks(what: str) -> None:
    """NotBuilt where several processes train together: under torchrun, or in a process group of
    torch.
    """
    world, said = this_rank().world, "WORLD_SIZE"
    distributed = sys.modules.get("torch.distributed")
    if (
        world == 1
        and distributed is not None
        and distributed.is_available()
        and distributed.is_initialized()
    ):
        world, said = distributed.get_world_size(), "the world size of torch's process group"
    if world > 1:
        raise NotBuilt(
            f"{said} is {world}: {what} with several processes is not built yet, each would see "
            "every sample; run one"
        )
