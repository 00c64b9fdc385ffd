"""What the examples on several processes have in common: how a rank joins the others that torchrun starts."""

import datetime
import os

import torch
import torch.distributed as dist


def join(timeout: int) -> torch.device:
    """Makes the default group, in which a rank waits ``timeout`` seconds for the others; the rank's device.

    The timeout bounds what a lost rank costs: the others fail, and torchrun starts all again. Each start meets under a
    name of its own in torchrun's store, which outlives them: a rank that is back first must not find the addresses of
    those that are gone.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(f"start_{starts_before()}", store),
        rank=rank,
        world_size=world_size,
        timeout=limit,
    )
    return device


def starts_before() -> int:
    """How often torchrun has started the ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
