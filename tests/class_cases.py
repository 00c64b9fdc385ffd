"""Problems of rows and classes, whole and spread over ranks: ArcFace, CosFace and the DINO head."""

import numpy as np
import torch
import torch.distributed as dist

from replearn_kernels import arcface_loss, cosface_loss, dino_head_loss

WIDTH, VIEWS, TEACHER_VIEWS = 5, 3, 2
EXACT = dict(rtol=1e-12, atol=1e-12)
SHARDS = {  # (rows, classes) of each rank
    2: [((4, 4), (3, 3)), ((1, 6), (5, 2)), ((5, 0), (0, 7))],
    3: [((3, 3, 3), (2, 2, 2)), ((1, 5, 2), (4, 1, 6)), ((0, 2, 4), (3, 0, 1))],
    4: [((2, 2, 2, 2), (2, 2, 2, 2)), ((4, 1, 0, 3), (1, 3, 2, 2))],
}
FACTORS = (2.0, 0.0, -3.0, 0.5)


def margin_problem(rows, classes):
    """The inputs of all ranks: (spread over rows; spread over classes), leaves by name."""
    g = torch.Generator().manual_seed(rows + 100 * classes)
    of_rows = {
        "embeddings": torch.randn(rows, WIDTH, generator=g, dtype=torch.float64),
        "labels": torch.randint(0, classes, (rows,), generator=g),
    }
    return of_rows, {"weight": torch.randn(classes, WIDTH, generator=g, dtype=torch.float64)}


def head_problem(rows, classes):
    """Samples lead here, so that all is spread along the first dimension."""
    g = torch.Generator().manual_seed(rows + 100 * classes)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    of_rows = {"student": normal(rows, VIEWS, WIDTH), "teacher": normal(rows, TEACHER_VIEWS, WIDTH)}
    return of_rows, {
        "student_weight": normal(classes, WIDTH), "teacher_weight": normal(classes, WIDTH), "center": normal(classes),
    }  # fmt: skip


def head_loss(student, teacher, student_weight, teacher_weight, center, **options):
    features = student.transpose(0, 1), teacher.transpose(0, 1)
    return dino_head_loss(*features, student_weight, teacher_weight, center, **options)


CASES = {  # inputs; loss; which inputs get a gradient
    "arcface": (margin_problem, lambda embeddings, labels, weight, **k: arcface_loss(embeddings, weight, labels, **k)),
    "cosface": (
        margin_problem,
        lambda embeddings, labels, weight, **k: cosface_loss(embeddings, weight, labels, scale=7.0, **k),
    ),
    "dino_head": (head_problem, head_loss),
}
DIFFERENTIABLE = {"embeddings", "weight", "student", "student_weight"}


def leaves(tensors):
    return {name: t.clone().requires_grad_(name in DIFFERENTIABLE) for name, t in tensors.items()}


def own_part(tensors, rank, sizes):
    return {name: t[sum(sizes[:rank]) :][: sizes[rank]] for name, t in tensors.items()}


def gradients_of(tensors):
    return {name: t.grad.numpy() for name, t in tensors.items() if t.grad is not None}


def keyword(name):
    return "shard_prototypes" if name == "dino_head" else "shard_classes"


def on_one_rank(rank, name, rows, classes, sharded, options):
    """The loss of a rank's shard and its gradients, as arrays."""
    problem, loss = CASES[name]
    of_rows, of_classes = problem(sum(rows), sum(classes))
    own_rows = leaves(own_part(of_rows, rank, rows))
    own_classes = leaves(own_part(of_classes, rank, classes) if sharded else of_classes)
    options = {keyword(name): sharded, **options}
    value = loss(**own_rows, **own_classes, group=dist.group.WORLD, **options)
    (value * FACTORS[rank] if options.get("reduction") else value).sum().backward()
    return value.detach().numpy(), {**gradients_of(own_rows), **gradients_of(own_classes)}


def in_one_process(name, rows, classes, reduction=None):
    """The losses of each rank's rows, what each returns, and the gradients of the mean over the ranks."""
    problem, loss = CASES[name]
    of_rows, of_classes = (leaves(tensors) for tensors in problem(sum(rows), sum(classes)))
    losses = loss(**of_rows, **of_classes, reduction="none", backend="eager").split(list(rows))
    world = len(rows)
    if reduction is None:
        sum(part.sum() for part in losses).div(sum(rows)).backward()
        values = [part.sum() * world / sum(rows) for part in losses]
    else:
        sum(part.sum() * factor for part, factor in zip(losses, FACTORS)).div(world).backward()
        values = [part if reduction == "none" else part.sum() for part in losses]
    return [value.detach() for value in values], {**gradients_of(of_rows), **gradients_of(of_classes)}


def check(answers, name, rows, classes, sharded, reduction=None):
    values, whole = in_one_process(name, rows, classes, reduction)
    world = len(rows)
    for rank, (value, gradients) in enumerate(answers):
        torch.testing.assert_close(torch.from_numpy(np.asarray(value)), values[rank], **EXACT)
        assert gradients.keys() == whole.keys()
        for leaf, gradient in gradients.items():
            if leaf in ("embeddings", "student"):
                expected = world * own_part(whole, rank, rows)[leaf]
            elif sharded:
                expected = own_part(whole, rank, classes)[leaf]
            else:
                continue
            np.testing.assert_allclose(gradient, expected, **EXACT)
    if not sharded:  # what DistributedDataParallel's average leaves
        for leaf in whole.keys() & {"weight", "student_weight"}:
            np.testing.assert_allclose(sum(g[leaf] for _, g in answers) / world, whole[leaf], **EXACT)
