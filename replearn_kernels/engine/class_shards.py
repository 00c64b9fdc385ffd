"""Classes that are spread over the ranks of a process group: the rows travel, the classes stay where they are.

With a million classes the weight is what does not fit, and moving it would cost more than all products with it. So
every rank has the rows of all ranks and sweeps them over its own classes. Between the sweeps the ranks tell each other
the rows' statistics, three numbers each ("partial FC", An et al. 2022, arXiv:2203.15565). The second sweep needs no
other rank: it leaves the whole gradient of the own classes, and for every row this rank's share of its gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backends import make_backend
from .backends.base import Backend, KeptTiles
from .plan import Plan
from .problem import Inputs, Problem
from .schedules import Config, of_order_one, on_device_of, plan_of
from .shards import Layout
from .sweeps import Gradients, sweep_gradients, sweep_statistics
from .world import World


class ClassShards(NamedTuple):
    """What :mod:`.schedules` is to a batch in one process: for the rows of all ranks, and the own classes.

    Takes one-directional objectives and reduction "none". Targets count from the first own class; those of other ranks
    lie outside. A row's upstream gradient is that of the rank whose row it is, whatever the others have.
    """

    layout: Layout

    def forward(self, inputs: Inputs, config: Config) -> tuple[Tensor, list[Tensor], bool]:
        """The losses of all rows, the same on every rank, what :meth:`backward` needs, and False: no gradients yet.

        Those need the statistics of all ranks.
        """
        with on_device_of(inputs.query):
            problem, plan, runner = _prepared(inputs, config)
            kept = KeptTiles(runner.new_kept(problem, plan.kept_elements))
            own, _ = sweep_statistics(problem, plan, runner, kept)
            table, *others = self.layout.world.gather(own, [problem.rows] * self.layout.world.size)
            for other in others:
                runner.objective.merge_statistics(table, other, problem.scale)
            losses = runner.objective.row_losses(problem, table, None)
            return losses, [kept.buffer, table] if any(config.needs_grad) else [], False

    def backward(
        self, grad_loss: Tensor, saved: list[Tensor], inputs: Inputs, config: Config, in_place: bool
    ) -> list[Tensor]:
        """For the rows this rank's share, to be summed over the ranks; for the classes all, as the mean over the ranks
        of what each makes of its loss. An empty tensor where none is due.
        """
        with on_device_of(inputs.query):
            world, counts = self.layout.world, self.layout.rows
            kept, table = saved
            upstream = torch.cat(world.gather(grad_loss.split(counts)[world.rank].contiguous(), counts))
            weights, factor = of_order_one(upstream)
            problem, plan, runner = _prepared(inputs, config)
            gradients = Gradients.zeros(problem, config.needs_grad[0])
            coefficients = runner.objective.coefficients(problem, table, None, weights)
            sweep_gradients(problem, plan, runner, KeptTiles(kept), coefficients, gradients)
            (d_rows, d_weight), *_ = runner.finish(problem, gradients, (factor,), config.needs_grad, needs_scale=False)
            if d_weight is not None:
                d_weight /= world.size
            results = (d_rows, d_weight, None)
            return [
                result.to(tensor.dtype) if needs else inputs.query.new_empty(0)
                for tensor, result, needs in zip(inputs.differentiable, results, config.needs_grad)
            ]


def own_classes(classes: int, world: World) -> range:
    """Those of this rank, where ``classes`` are divided evenly: the first ranks have one more each."""
    each, more = divmod(classes, world.size)
    first = world.rank * each + min(world.rank, more)
    return range(first, first + each + (world.rank < more))


def _prepared(inputs: Inputs, config: Config) -> tuple[Problem, Plan, Backend]:
    objective = config.make_objective()
    problem = Problem.build(inputs, config.needs_grad, objective)
    return problem, plan_of(inputs, config), make_backend(config.backend, objective)
