"""A process group as the engine sees it: who sits where, what all agree on, and all that leaves a process, counted."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .counters import count_sent


class World:
    """The ranks of a group, seen from one of them. Ranks are the group's, 0 to ``size - 1``."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.keywords: dict = {}  # of the call, which must be the same on every rank
        self.has_met = False

    @classmethod
    def of(cls, group) -> World | None:
        """None without a group, and of a group of one: nobody to exchange anything with.

        Raises:
            TypeError: not a process group.
            ValueError: this process is none of its ranks.
        """
        if group is None:
            return None
        if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must be one that this process is a rank of")
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a torch.distributed process group, got {type(group).__name__}")
        world = cls(group)
        return world if world.size > 1 else None

    def meet(self, description: dict) -> list[dict]:
        """The descriptions of all ranks. An "error" in one is an error on all: nobody waits for who will not come.

        Raises:
            ValueError: another rank has an error.
        """
        self.has_met = True
        descriptions: list[dict] = [{}] * self.size
        dist.all_gather_object(descriptions, description, group=self.group)
        errors = [f"rank {rank}: {told['error']}" for rank, told in enumerate(descriptions) if "error" in told]
        if errors and "error" not in description:
            raise ValueError(f"the loss failed on other ranks of the group: {'; '.join(errors)}")
        return descriptions

    def tell(self, description: dict) -> None:
        """:meth:`meet`, from wherever an error came up: not inside of what traces or transforms this rank's tensors."""
        with torch._C._DisableFuncTorch(), _disable_current_modes():
            self.meet(description)

    def gather(self, tensor: Tensor, counts: list[int]) -> list[Tensor]:
        """A small tensor of every rank, of ``counts[rank]`` entries along its last dimension; on all ranks."""
        most = max(counts)
        count_sent((self.size - 1) * tensor.numel())
        padded = torch.nn.functional.pad(tensor, (0, most - tensor.shape[-1]))
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=self.group)
        return [part[..., :count] for part, count in zip(gathered, counts)]

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, in their order: the same bits everywhere."""
        flat = tensor.reshape(-1)
        return sum(self.gather(flat, [flat.numel()] * self.size)).view(tensor.shape)

    def most(self, count: Tensor) -> int:
        """The largest of the ranks' counts, a number each."""
        return int(torch.cat(self.gather(count.reshape(1), [1] * self.size)).max())

    def start(self, sends: Iterable[tuple[int, Tensor]], receives: Iterable[tuple[int, Tensor]]) -> list[dist.Work]:
        """Send tensors to ranks and receive others in place, by (rank, tensor); to be waited for.

        Both ends list what goes from one to the other in the same order. Empty tensors stay where they are.
        """
        operations = [self._operation(dist.isend, rank, tensor) for rank, tensor in sends if tensor.numel()]
        count_sent(sum(operation.tensor.numel() for operation in operations))
        operations += [self._operation(dist.irecv, rank, tensor) for rank, tensor in receives if tensor.numel()]
        return dist.batch_isend_irecv(operations) if operations else []

    def exchange(self, sends: Iterable[tuple[int, Tensor]], receives: Iterable[tuple[int, Tensor]]) -> None:
        """:meth:`start`, and wait."""
        wait(self.start(sends, receives))

    def swap(self, sent: list[Tensor], counts: list[int]) -> list[Tensor]:
        """``sent[rank]`` goes to every rank; what comes from each, ``counts[rank]`` rows. All are of one kind."""
        own = sent[self.rank]
        received = [own.new_empty(count, *own.shape[1:]) for count in counts]
        received[self.rank] = own
        others = [rank for rank in range(self.size) if rank != self.rank]
        self.exchange([(rank, sent[rank]) for rank in others], [(rank, received[rank]) for rank in others])
        return received

    def _operation(self, kind, rank: int, tensor: Tensor) -> dist.P2POp:
        return dist.P2POp(kind, tensor, group=self.group, group_peer=rank)


class SharesGroup:
    """For modules with a process group, as attribute or option: a copy shares it, as it is a place in the world."""

    def __deepcopy__(self, memo):
        for group in (getattr(self, "group", None), getattr(self, "options", {}).get("group")):
            if group is not None:
                memo[id(group)] = group
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied


@contextmanager
def telling(world: World | None) -> Iterator[None]:
    """What fails here before all ranks have met is told to the others, who would wait for this one."""
    try:
        yield
    except Exception as error:
        if world is not None and not world.has_met:
            with suppress(RuntimeError):  # the others are gone: the error that came first says more
                world.tell({"error": f"{type(error).__name__}: {error}"})
        raise


def wait(pending: list[dist.Work]) -> None:
    for work in pending:
        work.wait()
