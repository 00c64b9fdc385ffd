"""A process group as the engine sees it: who sits where, what all agree on, and all that leaves a process, counted."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .counters import count_sent
from .recomputation import computed_again

_calls: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()  # begun on each group
_FAILED = 0  # in the place of the digest of a call that failed before it met the others


class World:
    """The ranks of a group, seen from one call on one of them. Ranks are the group's, 0 to ``size - 1``.

    Whatever a call exchanges, it begins with :meth:`meet`; what its backward pass exchanges, with :meth:`meet_again`.
    There all ranks bring a message of the same small size, whatever the call: where their calls differ, each finds out,
    before sizes that differ end a process (gloo) or pass for data.

    Args:
        name: of the call, as an error tells it.
    """

    def __init__(self, group: dist.ProcessGroup, name: str = ""):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.name, self.number = name, 0  # the calls of a group are numbered from 1, as they meet
        self.keywords: dict = {}  # of the call, which must be the same on every rank
        self.device: torch.device | None = None  # of what the call compares

    @classmethod
    def of(cls, group, name: str = "") -> World | None:
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
        world = cls(group, name)
        return world if world.size > 1 else None

    @property
    def has_met(self) -> bool:
        return self.number > 0

    def meet(self, description: dict, phase: str = "forward") -> list[dict]:
        """The descriptions of all ranks. An "error" in one is an error on all: nobody waits for who will not come.

        Raises:
            RuntimeError: another rank is in another call, on every rank. The group can go on.
            ValueError: another rank has an error.
        """
        self.number = _calls[self.group] = _calls.get(self.group, 0) + 1
        if computed_again():  # which an activation checkpoint may stop half-way
            phase = f"recomputed {phase}"
        return self._meet(phase, description)

    def meet_again(self, phase: str) -> None:
        """In a later phase of the call that :meth:`meet` began, with its exceptions. What can fail on one rank comes
        before, so that all who have met do exchange."""
        self._meet(phase, {})

    def _meet(self, phase: str, description: dict) -> list[dict]:
        call = f"{phase} of {self.name}, call {self.number}"
        told = pickle.dumps({"call": call, "calls": _calls[self.group], **description})
        digest = _digest(call)
        header = torch.tensor([_FAILED if "error" in description else digest, len(told)], device=self._device)
        digests, sizes = torch.stack(self._all_gather(header)).t().tolist()
        if not description and set(digests) == {digest}:
            return []
        text = torch.tensor(list(told.ljust(max(sizes), b"\0")), dtype=torch.uint8, device=self._device)
        texts = torch.stack(self._all_gather(text)).tolist()
        descriptions = [pickle.loads(bytes(text[:size])) for text, size in zip(texts, sizes)]
        _calls[self.group] = max(told["calls"] for told in descriptions)  # who skipped some has them behind it
        errors = [f"rank {rank}: {told['error']}" for rank, told in enumerate(descriptions) if "error" in told]
        if errors and "error" not in description:
            raise ValueError(f"the call failed on other ranks of the group: {'; '.join(errors)}")
        if not errors and set(digests) != {digest}:
            calls = "; ".join(f"{ranks}: {call}" for call, ranks in ranks_by([told["call"] for told in descriptions]))
            raise RuntimeError(
                f"different calls met on the ranks of the group: {calls}. All ranks must make the same calls, forward "
                "and backward, in the same order. Nothing of these was exchanged."
            )
        return descriptions

    @property
    def _device(self) -> torch.device:
        """Where the ranks tell each other something, as torch.distributed's own object collectives choose it: on the
        CPU, if the group can exchange from there, as no GPU is waited for then. Else on the GPU of the features, which
        need not be the current one."""
        kinds = [device.type for device in self.group._device_types] or ["cpu"]
        if "cpu" not in kinds and self.device is not None and self.device.type == kinds[0]:
            return self.device
        return torch.device("cpu" if "cpu" in kinds else kinds[0])

    def tell(self, description: dict) -> None:
        """:meth:`meet`, from wherever an error came up: not inside of what traces or transforms this rank's tensors."""
        with torch._C._DisableFuncTorch(), _disable_current_modes():
            self.meet(description)

    def gather(self, tensor: Tensor, counts: list[int]) -> list[Tensor]:
        """A small tensor of every rank, of ``counts[rank]`` entries along its last dimension; on all ranks."""
        most = max(counts)
        count_sent((self.size - 1) * tensor.numel())
        padded = torch.nn.functional.pad(tensor, (0, most - tensor.shape[-1]))
        return [part[..., :count] for part, count in zip(self._all_gather(padded), counts)]

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor, group=self.group)
        return gathered

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, in their order: the same bits everywhere."""
        flat = tensor.reshape(-1)
        return sum(self.gather(flat, [flat.numel()] * self.size)).view(tensor.shape)

    def sum_(self, tensor: Tensor) -> None:
        """The same in place, for large ones: in their size of memory, and in the backend's own order, the same on all
        ranks. What it sends is the backend's choice, and not counted."""
        dist.all_reduce(tensor, group=self.group)

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


def _digest(call: str) -> int:
    """What stands for it among the ranks: 64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(call.encode(), digest_size=8).digest(), "big", signed=True)


def ranks_by(values: list[str]) -> list[tuple[str, str]]:
    """(value, "rank 0, 2") of each of the ranks' values."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return [(value, f"rank {', '.join(map(str, at))}") for value, at in ranks.items()]


def wait(pending: list[dist.Work]) -> None:
    for work in pending:
        work.wait()
