"""The harness of the distributed tests: it tells what went wrong where, in time, and leaves nothing behind."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from processes import RankError, Ranks, needs_gloo

pytestmark = needs_gloo


def own_number(rank):
    total = torch.tensor(rank)
    dist.all_reduce(total)
    return os.getpid(), rank, total.item()


def fails_on_rank_1(rank):
    assert rank != 1, "this rank fails"


def dies(rank):
    if rank == 1:
        os._exit(7)


def hangs(rank):
    if rank == 0:
        time.sleep(60)


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_answers_errors_deaths_and_hangs(tmp_path):
    with Ranks(2, tmp_path) as ranks:
        (first, *a), (second, *b) = ranks.run(own_number)
        assert a == [0, 1] and b == [1, 1] and first != second
        with pytest.raises(RankError, match=r"(?s)rank 1 of 2: Traceback.*fails_on_rank_1.*this rank fails"):
            ranks.run(fails_on_rank_1)
        assert gone(first) and gone(second)
        with pytest.raises(RankError, match="rank 1 of 2: died, exit code 7"):
            ranks.run(dies)
        assert ranks.run(dies, dying={1}) == [None, None]
        with pytest.raises(RankError, match=r"no answer from ranks \[0\]"):
            ranks.run(hangs, deadline=4)
        pids = [pid for pid, *_ in ranks.run(own_number)]
    assert all(map(gone, pids))
