"""Training with momentum contrast: the queue of negatives and the momentum encoder.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020 (arXiv:1911.05722).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .engine import validation
from .engine.world import World, telling


class NegativeQueue(nn.Module):
    """The last ``size`` keys, in fixed memory, as negatives for :func:`~replearn_kernels.info_nce_loss`.

    A step of training::

        query, key = F.normalize(encoder(x1), dim=1), F.normalize(momentum_encoder(x2), dim=1)
        loss = info_nce_loss(query, key, negatives=queue.negatives(), batch_negatives=False, logit_scale=1 / 0.07)
        queue.push(key)
        loss.backward()
        optimizer.step()
        momentum_encoder.update(encoder)

    He et al., "Momentum Contrast", 2020 (arXiv:1911.05722).

    The buffers are ``keys``, ``[size, dim]``, and ``pushed``, int64: how many keys were pushed so far. They follow the
    module (``.to()``, ``.half()``) and are in its ``state_dict``. Key number n, counted from 0, is stored in row
    ``n % size``, so that ``pushed`` alone says where the next key goes and how many rows are valid, and a checkpoint
    resumes exactly.

    With ``torch.distributed`` every rank holds the same queue. Keep it outside DistributedDataParallel, which by
    default broadcasts the buffers of rank 0 in every forward pass: wasted work here, and with ``gather=False`` it
    would replace every rank's own keys by those of rank 0.

    Args:
        size: the keys it holds when full, at least 1.
        dim: the width of a key, at least 1.
        dtype: fp16, bf16, fp32 or fp64. Default: torch's default dtype.
        device: default: torch's default device.
        gather: with more than one process, push the keys of all ranks of the default group. Default True.

    Raises:
        TypeError: ``size`` or ``dim`` is not an int, ``gather`` not a bool, ``dtype`` none of the above.
        ValueError: ``size`` or ``dim`` is less than 1.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        gather: bool = True,
    ):
        super().__init__()
        self.size, self.dim = validation.check_count("size", size, 1), validation.check_count("dim", dim, 1)
        self.gather = validation.check_flag("gather", gather)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in validation.FEATURE_DTYPES:
            raise TypeError(f"dtype must be fp16, bf16, fp32 or fp64, got {dtype}")
        self.register_buffer("keys", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64, device=device))
        self._full = False  # known to be full: `pushed` need not be read back from a GPU any more

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Take in ``[B, dim]`` keys, replacing the oldest; of more than ``size`` the last ``size`` stay.

        B is any number, another one in every call: ``size`` need not be a multiple of it, and past the last row it goes
        on with the first. Keys are detached and cast to the queue's dtype. Safe at any time: also between a loss and
        its backward pass. With more than one process (and ``gather``) the keys of all ranks are pushed, in the order of
        the ranks; every rank must call it, with any number of keys. Telling that number waits for the device.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: wrong rank, width or device; any of these errors on another rank.
        """
        shared = self.gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        keys = self._keys_of_all_ranks(keys) if shared else self._checked(keys)
        self.pushed.add_(keys.shape[0])
        keys = keys[-self.size :]
        numbers = self.pushed - keys.shape[0] + torch.arange(keys.shape[0], device=keys.device)
        self.keys.index_copy_(0, numbers % self.size, keys)

    @torch._disable_dynamo
    def _keys_of_all_ranks(self, keys: Tensor) -> Tensor:
        """In the order of the ranks."""
        world = World.of(dist.group.WORLD, "NegativeQueue")
        with telling(world):
            keys = self._checked(keys)
        counts = [told["rows"] for told in world.meet({"rows": len(keys)}, "push")]
        return torch.cat(world.swap([keys.contiguous()] * world.size, counts))

    def _checked(self, keys: Tensor) -> Tensor:
        """In the queue's dtype."""
        validation.check_features("keys", keys)
        if keys.shape[1] != self.dim:
            raise ValueError(f"keys must have the queue's width {self.dim}, got {keys.shape[1]}")
        if keys.device != self.keys.device:
            raise ValueError(f"keys must be on the queue's device {self.keys.device}, got {keys.device}")
        return keys.to(self.keys.dtype)

    def negatives(self) -> Tensor:
        """The valid rows ``[K, dim]``, ``K = min(pushed, size)``, without gradient; ``[0, dim]`` of an empty queue.

        Row r holds the newest key whose number is r modulo ``size``: oldest first until the queue is full, from then
        on the oldest is row ``pushed % size``. The result is a copy. The loss keeps its negatives for the backward
        pass, and a view of the queue would be overwritten by a ``push`` before it. Until the queue is full, this waits
        for the device to tell how many rows are valid.
        """
        count = self.size if self._full else min(int(self.pushed), self.size)
        self._full = count == self.size
        return self.keys[:count].clone()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._full = False  # perhaps no longer: negatives() finds out

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, gather={self.gather}"


class MomentumEncoder(nn.Module):
    """A copy of an encoder that follows it slowly: the key encoder of MoCo, the target network of BYOL.

    He et al., "Momentum Contrast", 2020 (arXiv:1911.05722).

    The copy, ``.encoder``, is deep and its parameters require no gradient. A tensor that the encoder's last call left
    in an attribute is copied without its graph: ``nn.utils.weight_norm``, ``spectral_norm`` and ``prune`` leave a
    layer's weight so, which the copy's next call computes from its own parameters. Calling the module runs the copy
    under ``no_grad``. It starts in the encoder's mode and follows ``train()`` and ``eval()`` like any module: in
    training, as in MoCo, batch norm uses the batch's statistics and dropout is active; the running statistics are
    replaced by the encoder's in every :meth:`update`. The ``state_dict`` is the copy's, under ``encoder.``;
    ``momentum`` is a setting, not in it, and may be assigned between updates, for a schedule.

    Args:
        encoder: any module; of a DistributedDataParallel or compiled one, the module inside.
        momentum: m in [0, 1] of :func:`update_momentum`. Default 0.999.

    Raises:
        TypeError: ``encoder`` is not a module, ``momentum`` not a number.
        ValueError: ``momentum`` is outside [0, 1].
    """

    def __init__(self, encoder: nn.Module, momentum: float = 0.999):
        super().__init__()
        _check_module("encoder", encoder)
        self.momentum = validation.check_fraction("momentum", momentum)
        self.encoder = _deep_copy(encoder).requires_grad_(False)
        self.training = encoder.training

    @torch.no_grad()
    def forward(self, *args, **kwargs):
        return self.encoder(*args, **kwargs)

    def update(self, encoder: nn.Module) -> None:
        """Take one step towards ``encoder``: :func:`update_momentum` with the present ``momentum``."""
        update_momentum(self.encoder, encoder, self.momentum)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}"


@torch.no_grad()
def update_momentum(target_module: nn.Module, source_module: nn.Module, momentum: float = 0.999) -> None:
    """Move every parameter of the target towards the source's, in place; copy the buffers.

        target = m * target + (1 - m) * source

    He et al., "Momentum Contrast", 2020, equation 2 (arXiv:1911.05722).

    Parameters and buffers are matched by name. Each keeps the target's dtype and device: a target in fp32 can follow a
    source in half precision, whereas a half-precision target would round steps of 1 - m = 0.001 away. Buffers, such as
    batch norm's running statistics, are copied, and so are parameters of integers. Complex ones move as real ones do.

    Args:
        target_module: the module that follows.
        source_module: of the same structure; of a DistributedDataParallel or compiled module, the module inside.
        momentum: m in [0, 1]. Default 0.999; 0 copies, 1 leaves the parameters as they are.

    Raises:
        TypeError: not modules, or ``momentum`` is not a number.
        ValueError: ``momentum`` is outside [0, 1], or a parameter or buffer is missing on one side or differs in
            shape. Nothing has been changed then.
    """
    _check_module("target_module", target_module)
    _check_module("source_module", source_module)
    momentum = validation.check_fraction("momentum", momentum)
    parameters = _matched("parameter", target_module.named_parameters(), source_module.named_parameters())
    buffers = _matched("buffer", target_module.named_buffers(), source_module.named_buffers())
    averaged = [pair for pair in parameters if _is_continuous(pair[0]) and 0 < momentum < 1]
    if averaged:
        sources = [source.to(target.device, target.dtype) for target, source in averaged]
        torch._foreach_lerp_([target for target, _ in averaged], sources, 1 - momentum)
    copied = [pair for pair in parameters if not _is_continuous(pair[0]) or momentum == 0]
    for target, source in copied + buffers:
        target.copy_(source)


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _deep_copy(module: nn.Module) -> nn.Module:
    """Also of a module that has results of autograd among its attributes, which copy.deepcopy alone refuses."""
    results = (
        value
        for part in module.modules()
        for value in tree_leaves(vars(part))
        if isinstance(value, Tensor) and not value.is_leaf
    )
    return copy.deepcopy(module, {id(value): value.detach().clone() for value in results})


def _matched(
    kind: str, targets: Iterable[tuple[str, Tensor]], sources: Iterable[tuple[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """(target, source) of every name, all of which must be on both sides, in the same shape."""
    targets, sources = dict(targets), dict(sources)
    for name in [*targets, *sources]:
        if name not in sources:
            raise ValueError(f"source_module has no {kind} {name!r}, which target_module has")
        if name not in targets:
            raise ValueError(f"target_module has no {kind} {name!r}, which source_module has")
        if targets[name].shape != sources[name].shape:
            raise ValueError(
                f"{kind} {name!r} must have the same shape in both modules, got {tuple(targets[name].shape)} in "
                f"target_module and {tuple(sources[name].shape)} in source_module"
            )
    return [(target, sources[name]) for name, target in targets.items()]


def _check_module(name: str, module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
