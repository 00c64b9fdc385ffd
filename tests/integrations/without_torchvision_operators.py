"""Lets torchvision be imported beside a torch without CUDA.

The wheels of a package index are built for CUDA: their compiled operators do not load into a CPU build of torch, and
``import torchvision`` then fails at operators that nothing here calls. These are declared, without an implementation.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

_operators = torch.library.Library("torchvision", "FRAGMENT")

try:
    torch.ops.load_library(next(Path(find_spec("torchvision").origin).parent.glob("_C*.so")))
except OSError:
    _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
