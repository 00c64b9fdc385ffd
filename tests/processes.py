"""Checks that run in several processes, joined by gloo: started once, asked many times, never left behind.

    with Ranks(2, tmp_path) as ranks:
        ranks.run(check, 3)       # check(rank, 3) on both, and what each returned
"""

from __future__ import annotations

import datetime
import gc
import os
import sys
import time
import traceback
from multiprocessing.connection import wait

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")

_GRACE = 2.0  # seconds for the other ranks to say what they saw, once one has failed

# Processes are forked from a server that has imported what they need, and runs nothing: importing takes seconds each.
_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch._dynamo", "torch.distributed", "replearn_kernels"])


class RankError(AssertionError):
    """A check failed: the traceback of every rank that has one."""


class Ranks:
    """``world_size`` processes with a default group of gloo, which run what they are given until the block ends.

    Args:
        directory: where the file lives by which they meet.
        timeout: seconds that a collective waits for the others.
    """

    def __init__(self, world_size: int, directory, timeout: float = 60):
        self.world_size, self._directory, self._timeout = world_size, directory, timeout
        self._processes, self._connections, self._starts = [], [], 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def run(self, check, *args, deadline: float = 60, dying: frozenset[int] = frozenset()) -> list:
        """``check(rank, *args)`` on every rank; what they returned, by rank.

        ``dying``: the ranks that end without an answer, for which there is None. After an error, a deadline missed
        or a death all processes are killed, and the next call starts others.

        Raises:
            RankError: with the tracebacks of the ranks that failed, or the ranks that died or did not end in time.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((check, args))
        results, failures = {}, {}
        end = time.monotonic() + deadline
        awaited = set(range(self.world_size)) - dying
        while awaited and time.monotonic() < end:
            ready = wait([self._connections[rank] for rank in awaited], timeout=end - time.monotonic())
            for rank in [rank for rank in awaited if self._connections[rank] in ready]:
                awaited.discard(rank)
                try:
                    succeeded, answer = self._connections[rank].recv()
                except EOFError:
                    succeeded, answer = False, f"died, exit code {self._exit_code(rank)}"
                (results if succeeded else failures)[rank] = answer
            if failures:
                end = min(end, time.monotonic() + _GRACE)
        if failures or awaited or dying:
            self._kill()
        if failures or awaited:
            lines = [f"rank {rank} of {self.world_size}: {text}" for rank, text in sorted(failures.items())]
            if awaited:
                lines.append(f"no answer from ranks {sorted(awaited)}")
            raise RankError("\n".join(lines))
        return [results.get(rank) for rank in range(self.world_size)]

    def close(self) -> None:
        """Ends the processes: by asking, and whoever is still there after that, by force."""
        for connection in self._connections:
            connection.send(None)
        end = time.monotonic() + 20
        for process in self._processes:
            process.join(max(end - time.monotonic(), 0))
        self._kill()

    def _start(self) -> None:
        self._starts += 1
        store = os.path.join(self._directory, f"store{self.world_size}_{self._starts}")
        for rank in range(self.world_size):
            ours, theirs = _context.Pipe()
            arguments = (rank, self.world_size, store, theirs, self._timeout)
            process = _context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _exit_code(self, rank: int) -> int | None:
        self._processes[rank].join(5)
        return self._processes[rank].exitcode

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []


def _serve(rank: int, world_size: int, store: str, connection, timeout: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )  # fmt: skip
    while (job := connection.recv()) is not None:
        check, args = job
        try:
            torch.manual_seed(0)
            answer = True, check(rank, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send(answer)
        del job, check, args, answer
    _leave()


def _leave() -> None:
    """The end of a rank, without the interpreter's own.

    A DistributedDataParallel is held by cycles of references, and holds its process group, whose threads then outlive
    ``destroy_process_group`` and let go of Python objects while the interpreter is torn down: once in many runs that
    ends in std::terminate ("terminate called without an active exception"), after all checks have passed.
    """
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
