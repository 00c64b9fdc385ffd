"""Cross entropies between views, over prototypes that come in tiles (DINO, arXiv:2104.14294).

One sample has V student views and U teacher views, each a row of K logits s or t. With the running maximum m and sum
Z = sum_k exp((x_k - m) / temp) of every row, the cross entropy of a pair of views (u, v) is

    -sum_k p_t(u)_k log p_s(v)_k = log Z_v - 1 / (student_temp Z_u) X_uv
    X_uv = sum_k exp((t_uk - m_u) / teacher_temp) (s_vk - m_v)

No term of X is positive, so nothing cancels; a logit is subtracted from its maximum before a temperature divides it,
so nothing overflows. When a later tile raises m_v by r, X_uv falls by Z_u r; when it raises m_u, X_uv and Z_u shrink
alike.

A sample's loss is the mean over the P = U V - min(U, V) pairs u != v. Its gradient for a logit s_vk is

    W_vk = 1 / (P student_temp) sum_{u != v} (p_s(v)_k - p_t(u)_k)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """What one sweep over the prototypes leaves of every row."""

    student: Tensor  # [2, B, V]: max, sum
    teacher: Tensor  # [2, B, U]: max, sum
    cross: Tensor  # [B, U, V]: X

    def of_rows(self, rows: slice) -> Statistics:
        """Views of some samples' part."""
        return Statistics(self.student[:, rows], self.teacher[:, rows], self.cross[rows])


@dataclass(frozen=True)
class Dino:
    """Mean cross entropy over the pairs of different views."""

    student_temp: float
    teacher_temp: float

    def new_statistics(self, batch: int, student_views: int, teacher_views: int, like: Tensor) -> Statistics:
        """Of no prototypes: no sum, and as max half of the lowest number, from which a rise does not overflow."""
        tables = [like.new_zeros(2, batch, views) for views in (student_views, teacher_views)]
        for table in tables:
            table[0] = torch.finfo(like.dtype).min / 2
        return Statistics(*tables, like.new_zeros(batch, teacher_views, student_views))

    def update_statistics(self, student: Tensor, teacher: Tensor, statistics: Statistics) -> None:
        """Fold a tile of logits, ``student[B, V, C]`` and ``teacher[B, U, C]``, into the statistics."""
        (student_max, student_sum), (teacher_max, teacher_sum), cross = statistics
        self._raise_maxima(
            statistics, torch.maximum(student_max, student.amax(-1)), torch.maximum(teacher_max, teacher.amax(-1))
        )
        below = student - student_max.unsqueeze(-1)
        weights = _exp(teacher - teacher_max.unsqueeze(-1), self.teacher_temp)
        student_sum.add_(_exp(below, self.student_temp).sum(-1))
        teacher_sum.add_(weights.sum(-1))
        cross.baddbmm_(weights, below.transpose(1, 2))

    def merge_statistics(self, statistics: Statistics, other: Statistics) -> None:
        """Fold in those of the same samples over other prototypes; ``other`` is used up."""
        maxima = [torch.maximum(mine[0], theirs[0]) for mine, theirs in zip(statistics[:2], other[:2])]
        for part in (statistics, other):
            self._raise_maxima(part, *maxima)
        statistics.student[1].add_(other.student[1])
        statistics.teacher[1].add_(other.teacher[1])
        statistics.cross.add_(other.cross)

    def _raise_maxima(self, statistics: Statistics, student_max: Tensor, teacher_max: Tensor) -> None:
        """Express the statistics by higher maxima, in place."""
        (old_student, student_sum), (old_teacher, teacher_sum), cross = statistics
        rise, shrink = student_max - old_student, _exp(old_teacher - teacher_max, self.teacher_temp)
        student_sum.mul_(_exp(-rise, self.student_temp))
        cross.sub_(teacher_sum.unsqueeze(2) * rise.unsqueeze(1)).mul_(shrink.unsqueeze(2))
        teacher_sum.mul_(shrink)
        old_student.copy_(student_max)
        old_teacher.copy_(teacher_max)

    def losses(self, statistics: Statistics) -> Tensor:
        """Every sample's mean over its pairs of views, ``[B]``; 0 where there is no pair."""
        (_, student_sum), (_, teacher_sum), cross = statistics
        pairs = student_sum.log().unsqueeze(1) - cross / teacher_sum.unsqueeze(2) / self.student_temp  # [B, U, V]
        same_view = torch.eye(*pairs.shape[1:], dtype=torch.bool, device=pairs.device)
        return pairs.masked_fill(same_view, 0).sum((1, 2)) / max(count_pairs(*pairs.shape[1:]), 1)

    def coefficients(self, student: Tensor, teacher: Tensor, grad_rows: Tensor) -> tuple[Tensor, Tensor]:
        """What multiplies the exponentials of student and teacher in W, ``[B, V]`` and ``[B, U]``, for the tables of
        :class:`Statistics` and upstream gradients ``dL/dL_b``."""
        views, teacher_views = student.shape[2], teacher.shape[2]
        grad_pairs = grad_rows.unsqueeze(1) / (max(count_pairs(teacher_views, views), 1) * self.student_temp)
        other_views = teacher_views - (torch.arange(views, device=student.device) < teacher_views).to(student.dtype)
        return grad_pairs * other_views / student[1], grad_pairs / teacher[1]

    def weights(self, student: Tensor, teacher: Tensor, maxima, coefficients) -> Tensor:
        """``W = dL/ds`` of a tile, ``[B, V, C]``, for the (student, teacher) maxima and coefficients of its samples."""
        w = _exp(student - maxima[0].unsqueeze(2), self.student_temp).mul_(coefficients[0].unsqueeze(2))
        p = _exp(teacher - maxima[1].unsqueeze(2), self.teacher_temp).mul_(coefficients[1].unsqueeze(2))
        for u in range(p.shape[1]):  # of all views but its own: a sum over all, less one, would cancel
            w[:, :u] -= p[:, u : u + 1]
            w[:, u + 1 :] -= p[:, u : u + 1]
        return w


def count_pairs(teacher_views: int, student_views: int) -> int:
    """Pairs (u, v) with u != v."""
    return teacher_views * student_views - min(teacher_views, student_views)


def _exp(x: Tensor, temp: float) -> Tensor:
    return (x / temp).exp_()
