"""Losses that are declared: circle, also with parameters that learn, multi-similarity, InfoNCE with hard negatives,
sampled softmax, soft targets, VSE++."""

import math
from functools import partial

import torch
import torch.nn.functional as F

from bench.cases.batch import bare_products, without_self
from bench.cases.inputs import paired_features, unit_rows
from bench.cases.metric import class_members, labelled_embeddings
from bench.harness import Case, Inputs
from replearn_kernels import (
    circle_loss,
    hard_negative_loss,
    multi_similarity_loss,
    sampled_softmax_loss,
    soft_target_loss,
    vse_loss,
)
from replearn_kernels.declare import fuse
from replearn_kernels.pair_losses.circle import Circle

MARGIN, GAMMA = 0.4, 80.0
ALPHA, BETA, BASE = 2.0, 50.0, 0.5
HARDNESS = 1.0
TEACHER_SCALE = 20.0


def log_sums(near, far, embeddings, labels):
    """Of every row's positives and negatives, on whole matrices; near, far: functions of cosines of unit rows."""
    s, same = embeddings @ embeddings.T, labels[:, None] == labels
    positives = torch.where(without_self(same, False), near(s), -math.inf).logsumexp(1)
    return positives, torch.where(same, -math.inf, far(s)).logsumexp(1)


def log_sums_gathered(near, far, embeddings, labels):
    """The same, with whole matrices for the negatives only; the positives are gathered, class by class."""
    members, positive = class_members(labels)
    of_class = (embeddings[:, None] * embeddings[members]).sum(2)
    negatives = torch.where(labels[:, None] == labels, -math.inf, far(embeddings @ embeddings.T))
    return torch.where(positive, near(of_class), -math.inf).logsumexp(1), negatives.logsumexp(1)


def circle_dense(sums, embeddings, labels, margin=MARGIN, gamma=GAMMA):
    def near(s):
        return gamma * (1 + margin - s).relu().detach() * (1 - margin - s)

    def far(s):
        return gamma * (s + margin).relu().detach() * (s - margin)

    positives, negatives = sums(near, far, embeddings, labels)
    return -F.logsigmoid(-(positives + negatives)).mean()


def circle_that_learns(embeddings, labels, margin, gamma, **options):
    """Its cosines are of rows that are normalised already."""
    return fuse(Circle(margin, gamma), normalize=False, **options)(embeddings, labels)


def labelled_embeddings_and_parameters(n: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    inputs = labelled_embeddings(n, d, dtype, device)
    for name, value in (("margin", MARGIN), ("gamma", GAMMA)):
        inputs[name] = torch.tensor(value, device=device, requires_grad=True)
    return inputs


def images_and_texts(n: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    return {name: unit_rows(n, d, dtype, device, seed) for seed, name in enumerate(("image_features", "text_features"))}


def vse_dense(largest, image_features, text_features):
    """``largest``: of every row, or column, of a matrix without its diagonal."""
    s = image_features @ text_features.T
    negatives, own = without_self(s, -math.inf), s.diagonal()
    return sum((0.2 + largest(negatives, dim) - own).relu() for dim in (0, 1)).mean()


def multi_similarity_dense(sums, embeddings, labels):
    positives, negatives = sums(lambda s: -ALPHA * (s - BASE), lambda s: BETA * (s - BASE), embeddings, labels)
    return (-F.logsigmoid(-positives) / ALPHA - F.logsigmoid(-negatives) / BETA).mean()


def hard_negatives_by_exponentials(query, key, logit_scale):
    """The formula of the paper's code, right at small scales."""
    n = len(query)
    s = (logit_scale * query @ key.T).exp()
    positive, negative = s.diagonal(), without_self(s, 0.0)
    importance = without_self(s**HARDNESS, 0.0)
    g = (importance * negative).sum(1) / (importance.sum(1) / (n - 1))
    return -(positive / (positive + g)).log().mean()


def hard_negatives_by_logarithms(query, key, logit_scale):
    logits = logit_scale * query @ key.T
    positive, negatives = logits.diagonal(), without_self(logits, -math.inf)
    weighted = ((1 + HARDNESS) * negatives).logsumexp(1) - (HARDNESS * negatives).logsumexp(1)
    return -F.logsigmoid(positive - weighted - math.log(len(query) - 1)).mean()


def sampled_features(n: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    """Queries and the products that they belong to, of a tenth as many as there are, the first ones most often."""
    inputs = paired_features(("query", "key"), n, d, dtype, device)
    probability = 1 / torch.arange(1, n // 10 + 2)
    product = probability.multinomial(n, replacement=True, generator=torch.Generator().manual_seed(1))
    inputs["product"] = product.to(device)
    inputs["log_probability"] = (probability / probability.sum()).log()[product].to(device)
    return inputs


def sampled_softmax_dense(query, key, logit_scale, product, log_probability):
    logits = logit_scale * query @ key.T - log_probability
    duplicate = without_self(product[:, None] == product, False)
    return F.cross_entropy(logits.masked_fill(duplicate, -math.inf), torch.arange(len(query), device=query.device))


def sampled_softmax(query, key, logit_scale, product, log_probability, **options):
    return sampled_softmax_loss(
        query, key, key_group=product, key_log_probability=log_probability, logit_scale=logit_scale, **options
    )


def taught_features(n: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    """Images and texts, and a teacher's features of the same."""
    inputs = paired_features(("query", "key"), n, d, dtype, device)
    for seed, name in enumerate(("query_guide", "key_guide")):
        inputs[name] = unit_rows(n, d, dtype, device, seed=2 + seed).detach()
    return inputs


def soft_targets_dense(query, key, logit_scale, query_guide, key_guide):
    logits, probability = logit_scale * query @ key.T, (TEACHER_SCALE * query_guide @ key_guide.T).softmax(1)
    return F.cross_entropy(logits, probability)


circle = partial(circle_loss, margin=MARGIN, gamma=GAMMA, normalize=False)
multi_similarity = partial(multi_similarity_loss, alpha=ALPHA, beta=BETA, base=BASE, normalize=False)
hard_negatives = partial(hard_negative_loss, beta=HARDNESS)
soft_targets = partial(soft_target_loss, guide_scale=TEACHER_SCALE)

CIRCLE = Case(
    name="circle",
    title="Circle loss",
    make_inputs=labelled_embeddings,
    ours={"ours": circle, "ours_budget_0": partial(circle, memory_budget=0)},
    dense={"where": partial(circle_dense, log_sums), "gathered": partial(circle_dense, log_sums_gathered)},
    products={"products_2": bare_products},
)
MULTI_SIMILARITY = Case(
    name="multi_similarity",
    title="Multi-similarity loss",
    make_inputs=labelled_embeddings,
    ours={"ours": multi_similarity, "ours_budget_0": partial(multi_similarity, memory_budget=0)},
    dense={
        "where": partial(multi_similarity_dense, log_sums),
        "gathered": partial(multi_similarity_dense, log_sums_gathered),
    },
    products={"products_2": bare_products},
)
HARD_NEGATIVES = Case(
    name="hard_negatives",
    title="InfoNCE with hard negatives",
    make_inputs=partial(paired_features, ("query", "key")),
    ours={"ours": hard_negatives, "ours_budget_0": partial(hard_negatives, memory_budget=0)},
    dense={"exponentials": hard_negatives_by_exponentials, "logarithms": hard_negatives_by_logarithms},
)
SAMPLED_SOFTMAX = Case(
    name="sampled_softmax",
    title="Sampled softmax",
    make_inputs=sampled_features,
    ours={"ours": sampled_softmax, "ours_budget_0": partial(sampled_softmax, memory_budget=0)},
    dense={"cross entropy": sampled_softmax_dense},
)
SOFT_TARGETS = Case(
    name="soft_targets",
    title="Soft targets",
    make_inputs=taught_features,
    ours={"ours": soft_targets, "ours_budget_0": partial(soft_targets, memory_budget=0)},
    dense={"cross entropy": soft_targets_dense},
)
CIRCLE_THAT_LEARNS = Case(
    name="circle_that_learns",
    title="Circle loss, margin and gamma learn",
    make_inputs=labelled_embeddings_and_parameters,
    ours={"ours": circle_that_learns, "ours_budget_0": partial(circle_that_learns, memory_budget=0)},
    dense={"where": partial(circle_dense, log_sums), "gathered": partial(circle_dense, log_sums_gathered)},
)
VSE = Case(
    name="vse",
    title="VSE++",
    make_inputs=images_and_texts,
    ours={"ours": vse_loss, "ours_budget_0": partial(vse_loss, memory_budget=0)},
    dense={
        "max": partial(vse_dense, lambda s, dim: s.max(dim)[0]), "amax": partial(vse_dense, torch.amax),
    },  # fmt: skip
)
