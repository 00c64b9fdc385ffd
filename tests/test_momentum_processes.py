"""The queue of negatives in two processes: all ranks push the keys of all ranks, also in DistributedDataParallel."""

import pytest
import torch
import torch.distributed as dist
from processes import Ranks, needs_gloo
from torch import nn

from replearn_kernels import info_nce_loss
from replearn_kernels.momentum import MomentumEncoder, NegativeQueue


def numbered(start, count):
    """Keys that tell their number: key n is (n, -n)."""
    n = torch.arange(start, start + count, dtype=torch.float32)
    return torch.stack([n, -n], dim=1)


def first_column(queue):
    return queue.negatives()[:, 0].tolist()


def gathers_in_the_order_of_the_ranks(rank):
    queue = NegativeQueue(5, 2, dtype=torch.float64)
    queue.push(numbered(10 * rank, 2))
    assert first_column(queue) == [0, 1, 10, 11]
    queue.push(numbered(20 + 10 * rank, 2).t().contiguous().t())
    assert first_column(queue) == [21, 30, 31, 11, 20]
    queue.push(numbered(0, 0))
    assert queue.pushed.item() == 8


def takes_uneven_batches(rank):
    """Of 1 and 3 keys, of none and 2, of more than there is room for, in any layout of memory."""
    queue = NegativeQueue(5, 2, dtype=torch.float64)
    queue.push(numbered(10 * rank, 1 + 2 * rank))
    assert first_column(queue) == [0, 10, 11, 12]
    queue.push(numbered(20, 2 * rank).t().contiguous().t())
    assert first_column(queue) == [21, 10, 11, 12, 20]
    queue.push(numbered(30 + 10 * rank, 4 - rank))
    assert queue.pushed.item() == 13 and first_column(queue) == [40, 41, 42, 32, 33]


def tells_of_wrong_keys(rank):
    """Nobody waits for a rank whose keys were refused, and the queue goes on."""
    queue = NegativeQueue(5, 2)
    message = "keys must have the queue's width 2, got 3"
    with pytest.raises(ValueError, match=message if rank else f"failed on other ranks .*: rank 1: .*{message}"):
        queue.push(torch.zeros(2, 2 + rank))
    queue.push(numbered(rank, 1))
    assert first_column(queue) == [0, 1]


def own_queue_without_gather(rank):
    queue = NegativeQueue(5, 2, gather=False)
    queue.push(numbered(10 * rank, 1 + rank))
    assert first_column(queue) == ([0], [10, 11])[rank]


class Contrast(nn.Module):
    """Queue and encoders in one module, as DistributedDataParallel gets them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 2)
        self.follower, self.queue = MomentumEncoder(self.encoder), NegativeQueue(7, 2)

    def forward(self, x):
        key = self.follower(x)
        loss = info_nce_loss(self.encoder(x), key, negatives=self.queue.negatives())
        self.queue.push(key)
        return loss


def inside_distributed_data_parallel(rank):
    """Rank 1 starts with another state; rank 0's is broadcast, and both stay alike through wrap-around."""
    torch.manual_seed(rank)
    contrast = Contrast()
    if rank == 0:
        contrast.queue.pushed.fill_(3)
    model = nn.parallel.DistributedDataParallel(contrast)
    for step in range(3):
        model(torch.randn(2, 3)).backward()
        contrast.follower.update(contrast.encoder)
        assert len(contrast.queue.negatives()) == 7 and contrast.queue.pushed.item() == 3 + 4 * (step + 1)
    mine = torch.cat([contrast.queue.negatives(), contrast.encoder.weight.grad.t()])
    everyones = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(everyones, mine)
    assert torch.equal(*everyones)


DISTRIBUTED_CHECKS = [
    gathers_in_the_order_of_the_ranks,
    takes_uneven_batches,
    tells_of_wrong_keys,
    own_queue_without_gather,
    inside_distributed_data_parallel,
]


@needs_gloo
def test_two_processes(tmp_path):
    """Every check in DISTRIBUTED_CHECKS, on both ranks of one run."""
    with Ranks(2, tmp_path) as ranks:
        for check in DISTRIBUTED_CHECKS:
            ranks.run(check)
