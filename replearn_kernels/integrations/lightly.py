"""lightly's contrastive losses and DINO's, computed by this library: the same classes and values.

::

    from replearn_kernels.integrations.lightly import NTXentLoss

    loss = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))     # in the place of lightly.loss'
    loss(view_0, view_1).backward()

or ``apply()`` once, and ``lightly.loss`` has these. Each is a subclass of theirs with its constructor, and takes
``backend``, ``memory_budget`` and ``strategy`` besides. Losses are fp32 for half-precision features, where theirs have
the features' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..functional.rows import unit_rows
from ..pair_losses import decoupled_contrastive_loss
from ..ranks import default_group
from .options import TakesOptions, checked_options
from .replacing import Replacement
from .versions import require

require("lightly", "1.5.26", "2")

from lightly import loss as theirs  # noqa: E402


class NTXentLoss(TakesOptions, theirs.NTXentLoss):
    """:func:`~replearn_kernels.nt_xent_loss`, and with a memory bank MoCo's loss against the bank.

    With ``gather_distributed`` the rows are those of all processes, as there, and so are the gradients.

    Raises:
        TypeError, ValueError: an option is not of its type or range; in the call, a negative temperature.
    """

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views ``[N, d]``."""
        out0, out1 = unit_rows(out0), unit_rows(out1)
        out1, bank = self.memory_bank.forward(out1, update=out0.requires_grad)  # [d, K]
        if bank is None:
            group = default_group(self.gather_distributed)
            how = {"temperature": self.temperature, "normalize": False, "group": group, **self.options}
            return F.nt_xent_loss(out0, out1, **how)
        queue = bank.T.to(out0.device, out0.dtype)
        how = {"batch_negatives": False, "logit_scale": 1 / self.temperature, **self.options}
        return F.info_nce_loss(out0, out1, negatives=queue, **how)


class DCLLoss(TakesOptions, theirs.DCLLoss):
    """:func:`~replearn_kernels.decoupled_contrastive_loss`, with weights of the positives, if given.

    Raises:
        TypeError, ValueError: an option is not of its type or range; in the call, a negative temperature.
    """

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views ``[N, d]``."""
        out0, out1 = unit_rows(out0), unit_rows(out1)
        group = default_group(self.gather_distributed)
        how = {"temperature": self.temperature, "normalize": False, "group": group, **self.options}
        loss = decoupled_contrastive_loss(out0, out1, **how)
        if not self.weight_fn:
            return loss
        # A weight w multiplies the positive's part of the loss, - s / t: what is missing is (1 - w) s / t.
        missing = 2 - self.weight_fn(out0, out1) - self.weight_fn(out1, out0)
        positive = (out0.to(loss.dtype) * out1).sum(1) / self.temperature
        return loss + (missing * positive).mean() / 2


class DCLWLoss(theirs.DCLWLoss, DCLLoss):
    """The same with lightly's weights of the positives, by their von Mises-Fisher probability.

    Raises:
        TypeError, ValueError: as :class:`DCLLoss`.
    """

    def __init__(self, *args, backend="auto", memory_budget=DEFAULT_MEMORY_BUDGET, strategy="auto", **keywords):
        super().__init__(*args, **keywords)
        self.options = checked_options(backend, memory_budget, strategy)


class DINOLoss(theirs.DINOLoss):
    """:func:`~replearn_kernels.dino_loss`, with lightly's center and temperatures.

    Raises:
        ValueError: in the call, one view of the teacher and one of the student alone.
    """

    def forward(
        self,
        teacher_out: list[Tensor],
        student_out: list[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """The loss of the teacher's views ``[B, K]`` each, then the student's; the center moves."""
        if len(teacher_out) == len(student_out) == 1:
            raise ValueError("DINOLoss needs at least two views of one side: a view is not compared with itself")
        if teacher_temp is None:
            in_warmup = epoch is not None and epoch < self.warmup_teacher_temp_epochs
            teacher_temp = self.teacher_temp_schedule[epoch].item() if in_warmup else self.teacher_temp
        teacher, student = torch.stack(teacher_out), torch.stack(student_out)
        rounded = torch.tensor(teacher_temp).item()  # to fp32, as there
        center = self.center.flatten()
        loss = F.dino_loss(student, teacher, center, student_temp=self.student_temp, teacher_temp=rounded)
        self.update_center(teacher)
        return loss


_classes = Replacement(("lightly",), theirs, (DCLLoss, DCLWLoss, DINOLoss, NTXentLoss))


def apply() -> None:
    """Put these classes in the place of lightly's: ``lightly.loss`` has them from here on.

    A name that a module of another package has imported before stays what it was. :func:`undo` takes it back.
    """
    _classes.apply()


def undo() -> None:
    """Put lightly's own classes back."""
    _classes.undo()
