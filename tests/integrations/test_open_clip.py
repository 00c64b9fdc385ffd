"""open_clip's losses and ours in their place: values, gradients, training, several processes."""

import copy
import inspect
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import without_torchvision_operators  # noqa: F401, before open_clip
from accuracy import assert_as_accurate, unit_rows
from processes import Ranks, needs_gloo
from training import assert_same_training

from replearn_kernels.integrations import open_clip as ours

import open_clip  # isort: skip

OURS, THEIRS = ours._classes.ours, ours._classes.theirs
EXACT = dict(rtol=1e-11, atol=1e-13)
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


@pytest.fixture(autouse=True)
def _undone():
    yield
    ours.undo()


class Batch:
    """Features of both sides, of a student and a teacher, scale, bias, and a captioner's logits and tokens."""

    def __init__(self, n: int, dtype=torch.float64, width: int = 12, seed: int = 0):
        rng = torch.Generator().manual_seed(seed)
        self.image, self.text = unit_rows(rng, n, width).to(dtype), unit_rows(rng, n, width).to(dtype)
        self.dist_image, self.dist_text = unit_rows(rng, n, 7).to(dtype), unit_rows(rng, n, 7).to(dtype)
        self.scale, self.bias = torch.tensor(14.3, dtype=dtype), torch.tensor(-3.0, dtype=dtype)
        self.caption_logits = torch.randn(n, 5, 11, generator=rng).to(dtype)
        self.tokens = torch.randint(11, (n, 5), generator=rng)

    def rows(self, of: slice):
        """A rank's part."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            setattr(part, name, value[of] if value.ndim else value)
        return part


# name -> (class, its own arguments, what it is called with)
CALLS = {
    "clip": ("ClipLoss", {}, lambda b, loss, i, t, s, bias: loss(i, t, s)),
    "clip_with_bias": ("ClipLoss", {}, lambda b, loss, i, t, s, bias: loss(i, t, s, bias)),
    "siglip": ("SigLipLoss", {}, lambda b, loss, i, t, s, bias: loss(i, t, s, bias)),
    "coca": (
        "CoCaLoss",
        dict(caption_loss_weight=2.0, clip_loss_weight=0.7),
        lambda b, loss, i, t, s, bias: loss(i, t, b.caption_logits, b.tokens, s)[0],
    ),
    "distill": (
        "DistillClipLoss",
        {},
        lambda b, loss, i, t, s, bias: sum(loss(i, t, s, b.dist_image, b.dist_text, b.scale * 1.3)),
    ),
}


def loss_and_gradients(classes: dict, name: str, batch: Batch, **options) -> list[torch.Tensor]:
    """The loss of an object made with ``options``, and the gradients of image, text, scale and bias."""
    cls, arguments, call = CALLS[name]
    leaves = [t.clone().requires_grad_() for t in (batch.image, batch.text, batch.scale, batch.bias)]
    loss = call(batch, classes[cls](**arguments, **options), *leaves)
    loss.backward()
    if "bias" not in name and name != "siglip":  # it is not given
        leaves[3].grad = torch.zeros_like(batch.bias)
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 33, 257])
@pytest.mark.parametrize("name", CALLS)
def test_one_process(name, n, dtype):
    batch = Batch(n, dtype)
    exact = copy.copy(batch)
    for field, value in vars(batch).items():
        setattr(exact, field, value.double() if value.is_floating_point() else value)
    values = loss_and_gradients(OURS, name, batch)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert values[0].dtype is wide
    if (name, n) == ("distill", 1):  # all are 0, but for the rounding of the teacher's probability, 1, times the scale
        for value in values:
            limit = batch.scale.item() * EPS[wide]
            torch.testing.assert_close(value.double(), torch.zeros(value.shape).double(), rtol=0, atol=limit)
        return
    assert_as_accurate(values, loss_and_gradients(THEIRS, name, batch), loss_and_gradients(THEIRS, name, exact))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_options_of_ours(backend):
    batch = Batch(65)
    for name in CALLS:
        options = dict(backend=backend, memory_budget=0, strategy="ring")
        for a, b in zip(loss_and_gradients(OURS, name, batch, **options), loss_and_gradients(THEIRS, name, batch)):
            torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("cls, keys", [
    ("ClipLoss", {"contrastive_loss"}), ("SigLipLoss", {"contrastive_loss"}),
    ("CoCaLoss", {"contrastive_loss", "caption_loss"}), ("DistillClipLoss", {"contrastive_loss", "distill_loss"}),
])  # fmt: skip
def test_output_dict(cls, keys):
    b = Batch(9)
    given = {
        "ClipLoss": (b.image, b.text, b.scale),
        "SigLipLoss": (b.image, b.text, b.scale, b.bias),
        "CoCaLoss": (b.image, b.text, b.caption_logits, b.tokens, b.scale),
        "DistillClipLoss": (b.image, b.text, b.scale, b.dist_image, b.dist_text, b.scale),
    }[cls]
    arguments = dict(caption_loss_weight=1.0, clip_loss_weight=1.0) if cls == "CoCaLoss" else {}
    answers = [classes[cls](**arguments)(*given, output_dict=True) for classes in (OURS, THEIRS)]
    assert answers[0].keys() == keys
    torch.testing.assert_close(*answers, **EXACT)
    if "caption_loss" in keys:
        assert torch.equal(*(answer["caption_loss"] for answer in answers))


GATHERING = [dict(local_loss=local, gather_with_grad=grad) for local in (False, True) for grad in (False, True)]


def on_one_rank(rank: int, name: str, options: dict, sizes: list[int]):
    """Ours and theirs on the same ranks, before anything averages gradients."""
    start = sum(sizes[:rank])
    part = Batch(sum(sizes)).rows(slice(start, start + sizes[rank]))
    options = dict(options, rank=rank, world_size=dist.get_world_size())
    results = [loss_and_gradients(classes, name, part, **options) for classes in (OURS, THEIRS)]
    return [[value.numpy() for value in values] for values in results]


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    with Ranks(request.param, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def assert_same_on_every_rank(answers) -> None:
    """Loss and gradients of the features on each rank; those of scale and bias, which all ranks have, on the mean."""
    for ours_there, theirs_there in answers:
        for a, b in zip(ours_there[:3], theirs_there[:3]):
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), **EXACT)
    for scalar in (3, 4):
        means = [sum(torch.as_tensor(answer[side][scalar]) for answer in answers) / len(answers) for side in (0, 1)]
        torch.testing.assert_close(*means, **EXACT)


@needs_gloo
@pytest.mark.parametrize("options", GATHERING, ids=lambda o: "-".join(k for k, v in o.items() if v) or "neither")
@pytest.mark.parametrize("name", ["clip", "clip_with_bias", "coca", "distill"])
def test_several_processes(ranks, name, options):
    assert_same_on_every_rank(ranks.run(on_one_rank, name, options, [7] * ranks.world_size))


@needs_gloo
@pytest.mark.parametrize("how", ["bidir", "shift", "reduce", "gather"])
def test_several_processes_of_siglip(ranks, how):
    assert_same_on_every_rank(ranks.run(on_one_rank, "siglip", dict(dist_impl=how), [7] * ranks.world_size))


@needs_gloo
def test_world_size_is_not_the_groups(ranks):
    with pytest.raises(Exception, match="world_size must be the group's"):
        ranks.run(with_wrong_world_size)


def with_wrong_world_size(rank: int) -> None:
    batch = Batch(3)
    ours.ClipLoss(rank=rank, world_size=17)(batch.image, batch.text, batch.scale)


def created(**options):
    """What open_clip makes for its training script's arguments."""
    asked = dict(
        distill=False, model="ViT-B-32", siglip=False, local_loss=True, gather_with_grad=True, rank=0, world_size=1,
        horovod=False, loss_dist_impl=None, coca_caption_loss_weight=2.0, coca_contrastive_loss_weight=1.0,
    )  # fmt: skip
    return open_clip.create_loss(SimpleNamespace(**dict(asked, **options)))


@pytest.mark.parametrize("options, name", [
    ({}, "ClipLoss"), (dict(siglip=True), "SigLipLoss"), (dict(distill=True), "DistillClipLoss"),
    (dict(model="coca_ViT-B-32"), "CoCaLoss"),
])  # fmt: skip
def test_apply(options, name):
    """As often as one likes; what was made is an instance of open_clip's class, too."""
    assert type(created(**options)) is THEIRS[name]
    ours.apply()
    ours.apply()
    loss = created(**options)
    assert type(loss) is OURS[name] and isinstance(loss, THEIRS[name])
    assert getattr(open_clip.loss, name) is OURS[name]
    assert isinstance(loss, open_clip.loss.ClipLoss) == (name != "SigLipLoss")
    ours.undo()
    assert type(created(**options)) is THEIRS[name]
    assert open_clip.ClipLoss is open_clip.loss.ClipLoss is THEIRS["ClipLoss"]


def steps(loss, model, dtype: torch.dtype, count: int = 15) -> list[float]:
    """Losses of a training run with clipped gradients, as open_clip's script has it."""
    model = copy.deepcopy(model).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    rng = torch.Generator().manual_seed(1)
    image, text = torch.randn(24, 3, 32, 32, generator=rng), torch.randint(1, 64, (24, 8), generator=rng)
    losses = []
    for _ in range(count):
        total = sum(loss(**model(image.to(dtype), text), output_dict=True).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total.item())
    return losses


@pytest.mark.parametrize("cls", ["ClipLoss", "SigLipLoss"])
def test_training_step_by_step(cls):
    vision = dict(layers=2, width=64, head_width=32, patch_size=8, image_size=32)
    text = dict(context_length=8, vocab_size=64, width=64, heads=2, layers=2)
    siglip = dict(init_logit_scale=2.3, init_logit_bias=-10.0) if cls == "SigLipLoss" else {}
    model = open_clip.model.CLIP(32, vision, text, output_dict=True, **siglip)
    assert_same_training(*(partial(steps, classes[cls](), model) for classes in (OURS, THEIRS)))


@pytest.mark.parametrize("cls", ["ClipLoss", "SigLipLoss"])
def test_compile(cls):
    b = Batch(33, torch.float32)
    loss = OURS[cls]()
    compiled = torch.compile(loss, fullgraph=True)
    for n in (33, 20):
        given = b.image[:n], b.text[:n], b.scale, b.bias
        torch.testing.assert_close(compiled(*given), loss(*given))


def test_constructors_are_shown():
    options = ["backend", "memory_budget", "strategy"]
    for name, cls in OURS.items():
        theirs = list(inspect.signature(THEIRS[name]).parameters)
        assert list(inspect.signature(cls).parameters) == theirs + options

    class Mine(ours.ClipLoss):
        def __init__(self, extra):
            super().__init__()

    assert list(inspect.signature(Mine).parameters) == ["extra"]


def test_subclasses_of_ours():
    with pytest.raises(TypeError, match="Mine replaces get_logits, which .*open_clip.ClipLoss does not call"):

        class Mine(ours.ClipLoss):
            def get_logits(self, *given):
                return given


def test_bad_input():
    with pytest.raises(NotImplementedError, match="use_horovod"):
        ours.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="backend"):
        ours.SigLipLoss(backend="cuda")
    with pytest.raises(ValueError, match="memory_budget"):
        ours.CoCaLoss(1.0, 1.0, memory_budget=-1)
    with pytest.raises(AssertionError):  # open_clip's own
        ours.SigLipLoss(dist_impl="ring")
    with pytest.raises(TypeError, match="world_size"):
        ours.ClipLoss(world_size="2")
    b = Batch(4)
    with pytest.raises(RuntimeError, match="init_process_group"):
        ours.ClipLoss(world_size=2)(b.image, b.text, b.scale)
    with pytest.raises(ValueError, match="dist_image_features requires"):
        ours.DistillClipLoss()(b.image, b.text, b.scale, b.dist_image.requires_grad_(), b.dist_text, b.scale)
