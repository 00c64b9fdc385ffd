"""The C++ passes where one row or column lies far from all others, at every place that a vector's lane can have.

A pass takes rows and columns by vectors of 2 to 16 lanes, the last of them in part. A lane that is treated unlike the
others shows only where the largest, or smallest, value of all lies in it.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accuracy import unit_rows
from loss_cases import value_and_gradients

from replearn_kernels.engine import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=str(native.why_missing())),
    pytest.mark.usefixtures("one_thread"),  # a slab of 64 rows is one thread's work
]

# Two vectors of 16 lanes and a part of 1 or of 15; of 8 lanes one of 1 or 7, of 4 of 1 or 3, of 2 of 1.
SIZES = (33, 47)
# Logits are 100 and, in fp64, 1000: the maxima of a weak row lie 137 and 1,370 powers of two below the others', of a
# strong one twice as far above. One exp serves a tile whose maxima lie within 120 and 1,000 (csrc/cpu/shared_exp.inl).
SCALES = {torch.float32: 100.0, torch.float64: 1000.0}
# By what a row is multiplied. Of the distances, lifted structure's are exponents, and the others choose pairs.
FACTORS = {
    **dict.fromkeys(["clip", "queue", "nt_xent", "sup_con", "siglip"], (0.05, 3.0)),
    "lifted": (1000.0,),
    **dict.fromkeys(["contrastive", "batch_hard_euclidean", "semi_hard_euclidean", "batch_all_cosine"], (4.0,)),
}
PAIRED = ["clip", "queue", "nt_xent", "siglip"]  # have a second matrix
SETS = ["baseline", "avx2", "avx512"]


def outliers(name: str, n: int, dtype: torch.dtype):
    """(x, y, labels): each row of x, and of y, in turn moved away from all others. Labels are of two rows."""
    generator = torch.Generator().manual_seed(n)
    x, noise = (unit_rows(generator, n, 16, dtype=dtype) for _ in range(2))
    y = F.normalize(x + 0.1 * noise)  # every row's largest cosine is 0.99 or so
    for place in range(n):
        for factor in FACTORS[name]:
            for moved in range(2 if name in PAIRED else 1):
                pair = [x.clone(), y.clone()]
                pair[moved][place] *= factor
                if name == "lifted" and place ^ 1 < n:  # its label's other row goes to the other side: J > 0
                    pair[moved][place ^ 1] = -pair[moved][place]
                yield *pair, torch.arange(n) // 2


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.float64, 1e-11)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", FACTORS)
def test_an_outlier_in_every_lane(name, dtype, tolerance):
    """Against the plain formula in fp64, to the rounding of logits of 300 and 3,000."""
    wrong = []
    for n in SIZES[: 1 if name == "lifted" else None]:  # its formula takes as long as those of all others
        for case, (x, y, labels) in enumerate(outliers(name, n, dtype)):
            ours = value_and_gradients(name, x, y, labels, SCALES[dtype], backend="cpp")
            exact = value_and_gradients(name, x.double(), y.double(), labels, SCALES[dtype], backend="eager")
            errors = [((a - b).abs().amax() / b.abs().amax().clamp(min=1e-3)).item() for a, b in zip(ours, exact)]
            if not all(error <= tolerance for error in errors):  # NaN is none
                wrong.append((n, case, errors))
    assert not wrong, f"{len(wrong)} of the batches are wrong, the first: {wrong[:3]}"


@pytest.mark.skipif("REPLEARN_KERNELS_INSTRUCTION_SET" in os.environ, reason="one set, inside the test below")
@pytest.mark.parametrize("instruction_set", SETS)
def test_every_instruction_set(instruction_set):
    """The test above in fp32, in a process of its own for each set but the one that is tested here already."""
    if instruction_set == torch.ops.replearn_kernels.instruction_set():
        return
    environment = {**os.environ, "REPLEARN_KERNELS_INSTRUCTION_SET": instruction_set, "OMP_WAIT_POLICY": "passive"}
    options = ["-q", "-p", "no:cacheprovider", "-n", "0", "-k", "outlier and fp32"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "must be one of" in done.stdout + done.stderr:
        pytest.skip(f"{instruction_set} does not run on this processor")
    assert done.returncode == 0, done.stdout[-5000:]
