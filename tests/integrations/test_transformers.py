"""transformers' CLIP and SigLIP models with our losses in their forward, and in what wraps them."""

import copy
import inspect
import json
import pickle
from functools import partial

import pytest
import torch
import transformers
import without_torchvision_operators  # noqa: F401, before transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from processes import Ranks, needs_gloo
from small_models import MODELS, batch_for, small_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from training import assert_same_training
from transformers import CLIPModel, Trainer, TrainingArguments

from replearn_kernels.integrations.transformers import CLIP_MODELS, SIGLIP_MODELS, apply_to_clip, apply_to_siglip, undo

BOTH = pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])


def apply_to(model, name: str | None = None, **options):
    apply = apply_to_clip if (name or type(model).__name__) in CLIP_MODELS else apply_to_siglip
    return apply(model, **options)


def loss_and_gradients(model, batch, **options):
    model.zero_grad()
    output = model(**batch, return_loss=True, **options)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict, theirs: dict, tolerance: float = 1e-12) -> None:
    """Relative to each one's largest element."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        limit = tolerance * expected.abs().max().item()
        assert (ours[name] - expected).abs().max().item() <= max(limit, 1e-15), name


def test_every_model_has_a_sample():
    assert MODELS.keys() == CLIP_MODELS.keys() | SIGLIP_MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_as_the_model_has_it(name):
    model = small_model(name)
    batch = batch_for(model)
    theirs, expected = loss_and_gradients(model, batch)
    plain = model(**batch)
    assert apply_to(model) is model
    ours, gradients = loss_and_gradients(model, batch)
    assert type(ours) is type(theirs)
    assert theirs.loss.item() > 0.1
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=0)
    assert_same(gradients, expected)
    assert ours.logits_per_image is None and ours.logits_per_text is None
    with_logits, gradients = loss_and_gradients(model, batch, return_logits=True)
    assert_same(gradients, expected)
    for field in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        torch.testing.assert_close(with_logits[field], theirs[field], rtol=1e-12, atol=1e-12)
    for side in ("text_model_output", "vision_model_output"):
        assert torch.equal(ours[side].last_hidden_state, theirs[side].last_hidden_state)
    assert torch.equal(model(**batch).logits_per_text, plain.logits_per_text)  # without return_loss
    assert model(**batch).loss is None


@BOTH
def test_ways_to_call(name):
    model = small_model(name)
    batch = batch_for(model)
    own = model.forward
    loss = model(**batch, return_loss=True).loss
    parameters = list(inspect.signature(own).parameters)
    by_position = [batch.get(one) for one in parameters if one not in ("kwargs", "interpolate_pos_encoding")]
    by_position[parameters.index("return_loss")] = True
    apply_to(model)
    torch.testing.assert_close(model(*by_position).loss, loss)
    theirs, ours = (forward(**batch, return_loss=True, return_dict=False) for forward in (own, model))
    assert isinstance(ours, tuple) and len(ours) == len(theirs) - 2  # all but the logits
    torch.testing.assert_close(ours[1], theirs[3], rtol=1e-12, atol=1e-12)
    hidden = model(**batch, return_loss=True, output_hidden_states=True)
    assert len(hidden.text_model_output.hidden_states) == len(hidden.vision_model_output.hidden_states) == 3
    assert list(inspect.signature(model.forward).parameters) == [*parameters[:-1], "return_logits", "kwargs"]
    assert torch.is_grad_enabled() and model(**batch, return_loss=False).loss is None
    assert undo(model) is model and type(model).forward == own.__func__
    assert model(**batch, return_loss=True).logits_per_text is not None
    with pytest.raises(TypeError, match="what apply_to_clip or apply_to_siglip returned"):
        undo(model)


@BOTH
def test_evaluation_finds_the_logits_where_they_are(name):
    """By their place among the outputs, as Trainer's metrics do."""
    model = small_model(name).eval()
    batch = batch_for(model)
    theirs = model(**batch, return_loss=True)
    ours = apply_to(model)(**batch, return_loss=True)
    assert list(ours) == list(theirs)
    for a, b in zip(ours.to_tuple()[:5], theirs.to_tuple()[:5]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert model(**batch, return_loss=True, return_logits=False).logits_per_text is None
    assert model.train()(**batch, return_loss=True).logits_per_text is None


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_that_returns_tuples(name):
    model = small_model(name)
    batch = batch_for(model)
    expected = model(**batch, return_loss=True).loss
    apply_to(model).config.return_dict = False
    output = model(**batch, return_loss=True)
    assert isinstance(output, tuple)
    torch.testing.assert_close(output[0], expected, rtol=1e-12, atol=0)


class LargestResult(TorchDispatchMode):
    """How many elements the largest result of any operator has."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
        return result


@BOTH
def test_no_logits_are_formed(name, monkeypatch):
    """Of the loss alone: towers of a few rows would be hidden by it."""
    n = 2048
    model = small_model(name, torch.float32)
    image, text = torch.randn(2, n, 24)
    for side, features in (("image", image), ("text", text)):
        outputs = type("Outputs", (), dict(pooler_output=features))()
        monkeypatch.setattr(type(model), f"get_{side}_features", lambda self, outputs=outputs, **given: outputs)
    apply_to(model, memory_budget=0)
    with LargestResult() as results:
        model(return_loss=True).loss.backward()
    assert n * 24 <= results.largest < n * n / 4


def steps(name: str, prepare, dtype: torch.dtype, count: int = 15) -> list[float]:
    """Losses of a training run of a model that ``prepare`` has had."""
    model = prepare(small_model(name, dtype))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    batch, losses = batch_for(model, 16), []
    for _ in range(count):
        loss = model(**batch, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@BOTH
def test_training_step_by_step(name):
    assert_same_training(partial(steps, name, apply_to), partial(steps, name, lambda model: model))


class Pairs(torch.utils.data.Dataset):
    """With a column that no model takes."""

    def __init__(self, model):
        self.batch = batch_for(model, 32)

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict:
        return {**{name: value[i] for name, value in self.batch.items()}, "source": "somewhere"}


def collate(samples):
    assert all("source" not in sample for sample in samples)  # by the signature of forward
    return {**torch.utils.data.default_collate(samples), "return_loss": True}


def trained(model, directory) -> tuple[list[float], dict]:
    arguments = TrainingArguments(
        output_dir=directory, per_device_train_batch_size=8, per_device_eval_batch_size=8, num_train_epochs=2,
        learning_rate=1e-3, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = Pairs(model)
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=data, eval_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.evaluate()


@BOTH
def test_trainer(name, tmp_path):
    losses, evaluation = trained(apply_to(small_model(name)), tmp_path / "ours")
    expected, expected_evaluation = trained(small_model(name), tmp_path / "theirs")
    assert len(losses) == 8
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(evaluation["eval_loss"], expected_evaluation["eval_loss"], rtol=1e-9, atol=0)


@BOTH
def test_accelerate(name):
    """Mixed precision wraps the forward; unwrapping keeps ours."""
    AcceleratorState._reset_state(reset_partial_state=True)  # Trainer has made one
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = small_model(name, torch.float32)
    batch = batch_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(**batch, return_loss=True).loss
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    prepared, optimizer = accelerator.prepare(apply_to(model), optimizer)
    output = prepared(**batch, return_loss=True)
    assert output.logits_per_text is None
    torch.testing.assert_close(output.loss.item(), theirs.item(), rtol=2**-7, atol=0)
    accelerator.backward(output.loss)
    optimizer.step()
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped(**batch, return_loss=True).logits_per_text is None


@BOTH
def test_copies_and_files(name, tmp_path):
    """A copy computes with its own weights; a saved model is transformers' own."""
    model = apply_to(small_model(name))
    batch = batch_for(model)
    loss = model(**batch, return_loss=True).loss
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    torch.save(model, tmp_path / "whole.pt")
    twins.append(torch.load(tmp_path / "whole.pt", weights_only=False))
    replica = model._replicate_for_data_parallel()  # as DataParallel makes them, with parameters of their own
    replica._parameters = {name: parameter.detach() * 0 for name, parameter in model._parameters.items()}
    assert (replica(**batch, return_loss=True).loss - loss).abs() > 0.1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for twin in twins:
        assert type(twin) is type(model) and isinstance(twin, getattr(transformers, name))
        output = twin(**batch, return_loss=True)
        assert output.logits_per_text is None
        torch.testing.assert_close(output.loss, loss, rtol=0, atol=0)
    twin.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [name]
    own = getattr(transformers, name).from_pretrained(tmp_path).double().train()
    torch.testing.assert_close(own(**batch, return_loss=True).loss, loss)
    assert own(**batch, return_loss=True).logits_per_text is not None
    fused = type(model).from_pretrained(tmp_path).double().train()
    torch.testing.assert_close(fused(**batch, return_loss=True).loss, loss)
    assert fused(**batch, return_loss=True).logits_per_text is None


@BOTH
def test_compile(name):
    model = small_model(name, torch.float32)
    batch = batch_for(model)
    expected = model(**batch, return_loss=True).loss.item()
    apply_to(model)
    compiled = torch.compile(lambda **given: model(**given, return_loss=True).loss, fullgraph=True, backend="aot_eager")
    loss = compiled(**batch)
    loss.backward()
    torch.testing.assert_close(loss.item(), expected)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad) or name == "CLIPModel"


def in_two_processes(rank: int, name: str) -> tuple[float, dict]:
    model = apply_to(small_model(name), group=torch.distributed.group.WORLD)
    rows = slice(4 * rank, 4 * rank + 4)
    batch = {key: value[rows] for key, value in batch_for(model, 8).items()}
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    loss = parallel(**batch, return_loss=True).loss
    loss.backward()
    return loss.item(), {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}


@needs_gloo
@BOTH
def test_one_batch_of_two_processes(name, tmp_path):
    model = small_model(name)
    expected, whole = loss_and_gradients(model, batch_for(model, 8))
    with Ranks(2, tmp_path) as ranks:
        answers = ranks.run(in_two_processes, name)
    torch.testing.assert_close(sum(loss for loss, _ in answers) / 2, expected.loss.item(), rtol=1e-12, atol=0)
    for _, gradients in answers:
        assert_same({n: torch.from_numpy(g) for n, g in gradients.items()}, whole, 1e-11)


def test_subclasses():
    class Mine(CLIPModel):
        pass

    class Other(CLIPModel):
        def forward(self, **given):
            return super().forward(**given)

    model = Mine(small_model("CLIPModel").config)
    assert apply_to_clip(model)(**batch_for(model), return_loss=True).logits_per_text is None
    with pytest.raises(TypeError, match="Other has a forward of its own"):
        apply_to_clip(Other(model.config))


def test_bad_input():
    clip = small_model("CLIPModel")
    with pytest.raises(TypeError, match="CLIPModel has the other loss: use apply_to_clip"):
        apply_to_siglip(clip)
    with pytest.raises(TypeError, match="got Linear"):
        apply_to_clip(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got str"):
        apply_to_clip("openai/clip-vit-base-patch32")
    with pytest.raises(TypeError, match="got the class CLIPModel"):
        apply_to_clip(CLIPModel)
    with pytest.raises(ValueError, match="backend"):
        apply_to_clip(clip, backend="cuda")
    with pytest.raises(TypeError, match="group"):
        apply_to_clip(clip, group=2)
    with pytest.raises(ValueError, match="strategy"):
        apply_to_clip(clip, strategy="tree")
    assert type(clip) is CLIPModel
    batch = batch_for(apply_to_clip(clip))
    with pytest.raises(ValueError, match="text_features|image_features"):
        clip(**dict(batch, pixel_values=batch["pixel_values"][:4]), return_loss=True)
