"""Some seconds of tests/fuzz_losses.py for every instruction set; how to run it for longer stands there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_losses import CASES

from replearn_kernels.engine import native

FUZZ = Path(__file__).with_name("fuzz_losses.py")
CALLS = {"": 300, "baseline": 100, "avx2": 150}  # by instruction set; "": the widest


@pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
@pytest.mark.parametrize("instruction_set", CALLS)
def test_random_calls(instruction_set):
    """The same calls in every run, others for every instruction set."""
    environment = {**os.environ, "REPLEARN_KERNELS_INSTRUCTION_SET": instruction_set, "OMP_NUM_THREADS": "1"}
    seed = 10_000 * list(CALLS).index(instruction_set)
    command = [sys.executable, str(FUZZ), "--seed", str(seed), "--calls", str(CALLS[instruction_set])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "must be one of" in done.stderr:
        pytest.skip(f"{instruction_set} does not run on this processor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{CALLS[instruction_set]} random calls" in done.stdout


def test_a_wrong_result_is_told(monkeypatch, capsys):
    """A loss that is off by a thousandth, or NaN, is found, and the call can be made again by its number."""
    import fuzz_losses

    right = CASES["clip"]
    for wrong in (lambda loss: loss * 1.001, lambda loss: loss * float("nan")):

        def broken(*args, backend, wrong=wrong, **options):
            loss = right(*args, backend=backend, **options)
            return loss if backend == "eager" else wrong(loss)

        monkeypatch.setitem(CASES, "clip", broken)
        found = fuzz_losses.fuzz(0, 0, 20, ("clip",))
        assert len(found) > 10 and found[0] in capsys.readouterr().out
