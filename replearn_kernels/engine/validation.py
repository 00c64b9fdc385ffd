"""What is checked before any kernel runs: which argument, what it was, what was expected.

Shapes, dtypes and devices are checked at the call (:mod:`replearn_kernels.functional`), values inside the
operator, where a traced graph too can see them. On a GPU values are not read back, so that no step waits: a target
out of range trips a device-side assertion, and a NaN scale gives a NaN loss.
"""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor

from .problem import Inputs, statistics_dtype

REDUCTIONS = ("mean", "sum", "none")
BACKEND_NAMES = ("auto", "triton", "cpp", "torch", "eager")
STRATEGIES = ("auto", "ring", "gather")
FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


SHAPES = {2: "[N, d]", 3: "[N, K, d]"}


def check_features(name: str, features: Tensor, ndim: int = 2, shape: str | None = None) -> None:
    """A floating-point tensor of ``ndim`` dimensions; ``shape``: what to call it where it is wrong."""
    check_tensor(name, features)
    if features.ndim != ndim:
        wanted = shape or f"{ndim} dimensions {SHAPES[ndim]}"
        raise ValueError(f"{name} must have {wanted}, got shape {tuple(features.shape)}")
    if features.dtype not in FEATURE_DTYPES:
        raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {features.dtype}")


def check_tensor(name: str, tensor: Tensor) -> None:
    """A dense one."""
    if not isinstance(tensor, Tensor):
        makes_one = {"ndarray": "from_numpy", "list": "tensor", "tuple": "tensor"}.get(type(tensor).__name__)
        hint = makes_one and f": torch.{makes_one}({name}) makes one"
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}{hint or ''}")
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")


def check_alike(name: str, features: Tensor, other_name: str, other: Tensor) -> None:
    """Of the other's width, dtype and device."""
    if features.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{name} and {other_name} must have the same width d, "
            f"got {features.shape[-1]} and {other.shape[-1]}"
        )
    if features.dtype != other.dtype:
        raise TypeError(
            f"{name} and {other_name} must have the same dtype, got {features.dtype} and {other.dtype}"
        )
    if features.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must be on the same device, got {features.device} and {other.device}"
        )


def check_same_rows(name: str, features: Tensor, other_name: str, other: Tensor) -> None:
    """As many rows, where both have rows: what else is wrong with them is found later."""
    if features.is_nested or other.is_nested:
        return
    if features.ndim == other.ndim == 2 and features.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} and {other_name} must have the same number of rows, got {features.shape[0]} and {other.shape[0]}"
        )


def check_scale(name: str, scale: float | Tensor, query: Tensor) -> Tensor:
    """The scale as a 0-d tensor: of a tensor of shape [1], as FSDP2 needs them, a view, through which gradients go."""
    expected = "a float or a tensor of one element"
    if isinstance(scale, Tensor):
        check_tensor(name, scale)
        if scale.ndim > 1 or scale.numel() != 1:
            raise ValueError(f"{name} must be {expected}, 0-d or [1], got shape {tuple(scale.shape)}")
        if not scale.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating-point, got {scale.dtype}")
        if scale.device != query.device:
            raise ValueError(f"{name} must be on the features' device {query.device}, got {scale.device}")
        return scale.reshape(()) if scale.ndim else scale
    dtype = statistics_dtype(query.dtype)
    if (traced := _traced_scalar(scale)) is not None:
        return traced.to(query.device, dtype)
    scale = check_number(name, scale, expected)
    check_finite(name, scale, dtype)
    return torch.full((), float(scale), dtype=dtype, device=query.device)


def check_finite(name: str, value: float, dtype: torch.dtype) -> None:
    """Neither NaN nor beyond what the statistics' dtype holds. As one comparison, which a traced graph can make."""
    if not abs(value) <= torch.finfo(dtype).max:
        raise ValueError(f"{name} must be finite in {dtype}, got {value}")


def check_flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def check_target(
    target: Tensor | None, rows: int, columns: int, query: Tensor, *, name: str = "target", required: bool = False
) -> None:
    """int64 ``[rows]``; None, unless ``required``, where row i's positive is column i."""
    if target is None and not required:
        if rows > columns:
            raise ValueError(
                f"{name} is needed when there are more queries than keys, got N = {rows} and M = {columns}"
            )
        return
    check_tensor(name, target)
    if target.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {target.dtype}")
    if target.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), one per row, got {tuple(target.shape)}")
    if target.device != query.device:
        raise ValueError(f"{name} must be on the features' device {query.device}, got {target.device}")


def check_labels(name: str, labels: Tensor, rows: int, features: Tensor) -> Tensor:
    """Integers ``[rows]`` on the features' device, as int64."""
    check_tensor(name, labels)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    if labels.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), one per row, got {tuple(labels.shape)}")
    if labels.device != features.device:
        raise ValueError(f"{name} must be on the features' device {features.device}, got {labels.device}")
    return labels.to(torch.int64)


def check_positive(name: str, value: float) -> float:
    """A float above 0, and finite."""
    value = check_number(name, value)
    if not 0 < value <= torch.finfo(torch.float64).max:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def check_real(name: str, value: float) -> float:
    """A float, finite in every dtype of statistics."""
    value = float(check_number(name, value))
    check_finite(name, value, torch.float32)
    return value


def check_count(name: str, value: int, least: int, unit: str = "") -> int:
    """An int, NumPy's too, of at least ``least``; ``unit``: what it counts."""
    if not is_number(value) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{name} must be an int{unit and f' ({unit})'}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}{unit and f' {unit}'}, got {value}")
    return int(value)


def check_temperature(name: str, temperature: float | Tensor, features: Tensor) -> Tensor:
    """Its inverse, the scale, as a 0-d tensor; whether a tensor's value is positive, check_values tells."""
    dtype = statistics_dtype(features.dtype)
    if isinstance(temperature, Tensor) or _traced_scalar(temperature) is not None:
        return check_scale(name, temperature, features).to(dtype).reciprocal()
    scale = 1 / check_positive(name, temperature)
    if scale > torch.finfo(dtype).max:
        raise ValueError(f"{name} must be positive and finite in {dtype}, and its inverse too, got {temperature}")
    return torch.full((), scale, dtype=dtype, device=features.device)


def check_margin(margin: float, most: float = torch.finfo(torch.float32).max) -> float:
    """In [0, ``most``]."""
    margin = check_number("margin", margin)
    if not 0 <= margin <= most:
        raise ValueError(f"margin must be in [0, {most:.6g}], got {margin}")
    return float(margin)


def check_reduction(reduction: str) -> None:
    check_choice("reduction", reduction, REDUCTIONS)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def check_backend_name(name: str, names: tuple[str, ...] = BACKEND_NAMES) -> None:
    check_choice("backend", name, names)


def check_strategy(strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")


def is_number(value) -> bool:
    """A Python number or a NumPy scalar; a bool is none."""
    return isinstance(value, (int, float, Real)) and not isinstance(value, bool)


def check_number(name: str, value: float, expected: str = "a float") -> float:
    """The number; of a NumPy scalar, as Python has it."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if is_number(value):
        try:
            return int(value) if isinstance(value, Integral) else float(value)
        except OverflowError:  # of a fraction
            raise ValueError(f"{name} must be finite, got {type(value).__name__} beyond any float") from None
    if (traced := _traced_scalar(value)) is not None:
        if traced.dtype != torch.float64:
            raise TypeError(f"{name} is a NumPy scalar, whose value torch.compile does not know: use float({name})")
        return traced.item()
    raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def _traced_scalar(value) -> Tensor | None:
    """A NumPy scalar inside of torch.compile, which makes a 0-d array of it; elsewhere None."""
    if torch.compiler.is_compiling() and type(value).__name__ == "ndarray" and value.ndim == 0:
        scalar = torch.as_tensor(value)
        return None if scalar.dtype == torch.bool or scalar.dtype.is_complex else scalar
    return None


def check_fraction(name: str, value: float) -> float:
    """A float in [0, 1]."""
    value = check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)


def check_memory_budget(memory_budget: int) -> int:
    """In bytes, as the operator takes it: more than it can count is no limit at all."""
    return min(check_count("memory_budget", memory_budget, 0, "bytes"), torch.iinfo(torch.int64).max)


def check_values(inputs: Inputs, objective) -> None:
    """The checks that read data: target within the keys, scale and bias finite."""
    dtype = statistics_dtype(inputs.query.dtype)
    if inputs.logit_scale.is_cpu:
        scale = inputs.logit_scale.item()
        if not objective.by_temperature:
            check_finite("logit_scale", scale, dtype)
        elif not 0 < scale <= torch.finfo(dtype).max:
            raise ValueError(f"temperature must be positive and finite in {dtype}, got {1 / scale if scale else 'inf'}")
    if inputs.logit_bias is not None and inputs.logit_bias.is_cpu:
        check_finite("logit_bias", inputs.logit_bias.item(), dtype)
    if inputs.learned is not None and inputs.learned.is_cpu:
        for name, value in zip(objective.learned, inputs.learned.tolist()):
            check_finite(name, value, dtype)
    name = objective.target_name
    target = inputs.target
    if target is None or target.numel() == 0:
        return
    check_inside(name, target, inputs.widths[0])


def check_inside(name: str, index: Tensor, count: int) -> None:
    """In [0, ``count``)."""
    if index.numel() == 0:
        return
    if index.device.type == "cpu":
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} must be in [0, {count}), got {wrong}")
    else:
        inside = ((index >= 0) & (index < count)).all()
        torch._assert_async(inside, f"{name} must be in [0, {count})")
