"""One batch in one process, and the same batch divided among processes joined by gloo, with the same cores in all."""

import atexit
import tempfile
from functools import cache, partial

import torch
import torch.distributed as dist

from bench.cases.batch import SUP_CON
from bench.cases.contrastive import CLIP, SIGLIP
from bench.harness import Case, Inputs, Step

RANKS = 2  # of one thread each
DEADLINE = 600  # seconds
DIVIDED = {case.name: case for case in (CLIP, SIGLIP, SUP_CON)}

_shards: dict[str, Inputs] = {}  # in a rank's process: what it holds of each case's inputs


@cache
def ranks():
    from tests.processes import Ranks  # needs pytest, which the other cases do not

    group = Ranks(RANKS, tempfile.mkdtemp(), timeout=DEADLINE)
    atexit.register(group.close)
    return group


def take_shard(rank: int, case: str, shards: list[Inputs]) -> None:
    _shards[case] = {name: t.requires_grad_(t.is_floating_point()) for name, t in shards[rank].items()}


def shard_step(rank: int, case: str, strategy: str) -> float:
    """Forward and backward of the rank's shard."""
    shard = _shards[case]
    loss = DIVIDED[case].ours["ours"](**shard, group=dist.group.WORLD, strategy=strategy)
    torch.autograd.grad(loss, [tensor for tensor in shard.values() if tensor.requires_grad])
    return loss.item()


def prepare(case: str, strategy: str, inputs: Inputs) -> Step:
    """The step of all ranks, from which they come back with the batch's loss: the mean of theirs."""
    parts = {name: t.detach().chunk(RANKS) if t.ndim else [t.detach()] * RANKS for name, t in inputs.items()}
    shards = [{name: part[rank].clone() for name, part in parts.items()} for rank in range(RANKS)]
    ranks().run(take_shard, case, shards, deadline=DEADLINE)
    return lambda: (torch.tensor(ranks().run(shard_step, case, strategy, deadline=DEADLINE)).mean(),)


def divided(case: Case) -> Case:
    """Ours of a case, whole and divided."""
    return Case(
        name=f"{case.name}_ranks",
        title=f"{case.title}: one process with all threads, {RANKS} processes with one thread each",
        make_inputs=case.make_inputs,
        ours={"ours": case.ours["ours"]},
        dense={},
        processes={f"ranks_{strategy}": partial(prepare, case.name, strategy) for strategy in ("ring", "gather")},
        backends=("auto", "cpp"),
        sizes=(8192,),
    )


RANKS_CASES = tuple(divided(case) for case in DIVIDED.values())
