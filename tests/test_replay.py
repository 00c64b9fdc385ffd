"""Calls that were made before run a program of their steps: with other data it does what the call would do.

In Triton's interpreter, and on a GPU. What compiled kernels are given there, test_host_time.py compares.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from loss_cases import CASES, DECLARED

pytest.importorskip("triton")

from triton_harness import SMALL_BLOCKS, gpu, interpreter

import replearn_kernels as rk
from replearn_kernels.engine import problem, schedules
from replearn_kernels.engine.backends import replay
from replearn_kernels.engine.backends import triton as triton_backend
from replearn_kernels.engine.backends.replay import Recorder
from replearn_kernels.engine.backends.triton import TritonBackend
from replearn_kernels.triton_kernels.configs import kernel_settings, use_config
from replearn_kernels.triton_kernels.launching import heard_by, run_kernel

READS_BACK = "lifted", "batch_all"
"""Their lists of near pairs, and of a row's positives, are as long as the data says."""
REPEATED = [name for name in CASES if name not in DECLARED and not name.startswith((*READS_BACK, "semi_hard"))]
"""Semi-hard triplets are mined first, and are few: no sweep."""

ELSEWHERE = torch.ones(3)


@pytest.fixture
def programs(monkeypatch):
    """All that is known of calls: at first nothing."""
    known = {}
    monkeypatch.setattr(replay, "_programs", known)
    return known


@pytest.fixture
def on_cpu(programs, monkeypatch):
    """CPU tensors are taken for a GPU's, whose numbers nobody waits for."""
    monkeypatch.setattr(TritonBackend, "repeats", staticmethod(lambda query: True))
    monkeypatch.setattr(problem, "number_of", lambda scalar: scalar)
    monkeypatch.setattr(triton_backend, "kernel_settings", lambda dtype: dtype)
    with use_config(SMALL_BLOCKS):
        yield programs


@pytest.fixture
def worked_out(monkeypatch):
    """The calls, forward and backward, that are not left to a program."""
    calls = []

    def counted(function):
        return lambda *given: calls.append(function.__name__) or function(*given)

    for name in ("_forward", "_backward"):
        monkeypatch.setattr(schedules, name, counted(getattr(schedules, name)))
    return calls


def batch(seed: int, n: int = 24, d: int = 8, device: str = "cpu") -> list[torch.Tensor]:
    """x, y and labels."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, d, generator=generator) for _ in range(2))
    return [tensor.to(device) for tensor in (x, y, torch.randint(0, 6, (n,), generator=generator))]


def results(loss, x, y, labels, **options) -> list[torch.Tensor | None]:
    """The loss and its gradients for x and y."""
    leaves = [x.detach().requires_grad_(), y.detach().requires_grad_()]
    value = loss(*leaves, labels, 3.0, backend="triton", **options)
    value.backward(torch.linspace(0.5, 1.5, value.numel(), device=x.device).view(value.shape))
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def without_programs(monkeypatch, *given, **options) -> list[torch.Tensor | None]:
    with monkeypatch.context() as patch:
        patch.setattr(TritonBackend, "repeats", staticmethod(lambda query: False))
        return results(*given, **options)


def assert_same_bits(ours, expected) -> None:
    assert [tensor is None for tensor in ours] == [tensor is None for tensor in expected]
    for a, b in zip(ours, expected):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_repeated(loss, programs, worked_out, monkeypatch, n=24, d=8, device="cpu", **options) -> None:
    """Of four batches the first is worked out, the second recorded, and the others run programs, to the same bits."""
    for seed in range(4):
        given = batch(seed, n, d, device)
        expected = without_programs(monkeypatch, loss, *given, **options)
        worked_out.clear()
        assert_same_bits(results(loss, *given, **options), expected)
        assert bool(worked_out) == (seed < 2)
    assert programs and all(callable(program) for program in programs.values())


class TestEveryLoss:
    pytestmark = interpreter

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("name", REPEATED)
    def test_programs_do_what_the_calls_do(self, name, reduction, on_cpu, worked_out, monkeypatch):
        assert_repeated(CASES[name], on_cpu, worked_out, monkeypatch, reduction=reduction)

    @pytest.mark.parametrize("name", ["clip", "symmetric", "queue", "siglip", "arcface", "contrastive"])
    def test_of_many_tiles(self, name, on_cpu, small_tiles, worked_out, monkeypatch):
        assert_repeated(CASES[name], on_cpu, worked_out, monkeypatch, n=40)

    @pytest.mark.parametrize("name", [name for name in CASES if name.startswith(READS_BACK)])
    def test_what_waits_for_numbers_is_worked_out_every_time(self, name, on_cpu, worked_out, monkeypatch):
        for seed in range(3):
            given = batch(seed, 12)
            expected = without_programs(monkeypatch, CASES[name], *given)
            worked_out.clear()
            assert_same_bits(results(CASES[name], *given), expected)
            assert "_forward" in worked_out
        assert any("tells the host" in known for known in on_cpu.values() if isinstance(known, str))

    @pytest.mark.parametrize("name", ["circle", "decoupled"])
    def test_what_runs_code_of_its_author_has_no_program(self, name, on_cpu, worked_out):
        for seed in range(3):
            worked_out.clear()
            results(CASES[name], *batch(seed))
            assert worked_out == ["_forward", "_backward"]
        assert not on_cpu


class TestWhichCallsAreTheSame:
    """What one program must not do for another call."""

    pytestmark = interpreter

    def assert_told_apart(self, on_cpu, monkeypatch, *calls) -> None:
        """Each of the calls, three times in turn, gives what it gives without programs."""
        for _ in range(3):
            for loss, given, options in calls:
                expected = without_programs(monkeypatch, loss, *given, **options)
                assert_same_bits(results(loss, *given, **options), expected)
        forward = [key for key in on_cpu if key[0][1][0] is schedules._forward]
        assert len(forward) == len(calls)

    def test_sizes_and_strides(self, on_cpu, monkeypatch):
        x, y, labels = batch(0, n=40)
        rows = [slice(0, 24), slice(16, 40), slice(0, 40, 2), slice(5, 13)]
        given = [[x[part], y[part], labels[part]] for part in rows]
        wide = torch.randn(24, 16)
        given += [[wide[:, ::2], y[:24], labels[:24]], [wide[:, :8], y[:24], labels[:24]]]
        given = [given[0], *given[2:]]  # 0 and 1 are alike
        self.assert_told_apart(on_cpu, monkeypatch, *((CASES["clip"], tensors, {}) for tensors in given))

    def test_alignments(self, on_cpu, monkeypatch):
        memory, (_, y, labels) = torch.randn(24 * 8 + 4), batch(0)
        starts = [memory[start : start + 24 * 8].view(24, 8) for start in (0, 1, 2)]
        self.assert_told_apart(on_cpu, monkeypatch, *((CASES["clip"], [x, y, labels], {}) for x in starts))

    def test_options_and_gradients(self, on_cpu, monkeypatch):
        given = batch(0)
        calls = [
            (CASES["clip"], given, {}),
            (CASES["clip"], given, {"reduction": "sum"}),
            (CASES["clip"], given, {"memory_budget": 0}),
            (CASES["info_nce"], given, {}),
            (CASES["symmetric"], given, {}),
            (lambda x, y, *others, **options: CASES["clip"](x.detach(), y, *others, **options), given, {}),
            (CASES["arcface"], given, {}),
            (lambda *given, **options: CASES["arcface"](*given, margin=0.3, **options), given, {}),
            (CASES["contrastive"], given, {"margin": 0.2}),  # of the same numbers as options
            (CASES["batch_hard_squared_euclidean"], given, {"margin": 0.2}),
        ]
        self.assert_told_apart(on_cpu, monkeypatch, *calls)

    def test_a_tensor_given_twice(self, on_cpu, monkeypatch):
        def twice(x, y, labels, scale, **options):
            return rk.info_nce_loss(x, x, logit_scale=scale, **options)

        given = batch(0)
        self.assert_told_apart(on_cpu, monkeypatch, (twice, given, {}), (CASES["info_nce"], given, {}))

    def test_a_learnable_scale_and_bias(self, on_cpu, worked_out, monkeypatch):
        def step(seed):
            x, y, _ = batch(seed)
            leaves = [x, y, torch.tensor(2.0 + seed), torch.tensor(-1.0 - seed)]
            for leaf in leaves:
                leaf.requires_grad_()
            loss = rk.siglip_loss(*leaves, backend="triton") + rk.clip_loss(*leaves[:3], backend="triton")
            return [loss.detach(), *torch.autograd.grad(loss, leaves)]

        for seed in range(4):
            with monkeypatch.context() as patch:
                patch.setattr(TritonBackend, "repeats", staticmethod(lambda query: False))
                expected = step(seed)
            assert_same_bits(step(seed), expected)
        assert all(callable(program) for program in on_cpu.values())


class TestPrograms:
    """What holds of every program, and of the table of them."""

    pytestmark = interpreter

    def test_on_a_cpu_nothing_is_repeated(self, programs):
        for seed in range(3):
            results(CASES["clip"], *batch(seed))
        assert not programs

    def test_while_work_is_counted_or_operators_are_watched(self):
        class Query:
            is_cuda = True

        assert TritonBackend.repeats(Query)
        with rk.count_work():
            assert not TritonBackend.repeats(Query)
        with Recorder([torch.zeros(1)]):
            assert not TritonBackend.repeats(Query)

    def test_while_configs_are_given(self, programs):
        assert kernel_settings(torch.float16) is not None
        x = torch.ones(2)
        with use_config(SMALL_BLOCKS):
            assert kernel_settings(torch.float16) is None
            for number in range(4):
                assert TritonBackend.repeat("key", [x], lambda number=number: number) == number
        assert not programs

    def test_if_the_user_wants_none(self, monkeypatch):
        monkeypatch.setattr(triton_backend, "_REPLAYS", False)
        assert not TritonBackend.repeats(type("Query", (), {"is_cuda": True}))

    def test_settings_are_told_apart(self, programs, monkeypatch):
        for setting in (1, 2, 1, 2, 1, 2):
            monkeypatch.setattr(triton_backend, "kernel_settings", lambda dtype, setting=setting: setting)
            x = torch.ones(2)
            made = TritonBackend.repeat("key", [x], lambda x=x, setting=setting: x * setting)
            assert torch.equal(made, x * setting)
        assert len(programs) == 2

    def test_options_of_triton_are_settings(self, monkeypatch):
        import triton

        before = kernel_settings(torch.float16)
        monkeypatch.setattr(triton.knobs.runtime, "debug", not triton.knobs.runtime.debug)
        assert kernel_settings(torch.float16) != before

    def test_precision_of_fp32_is_a_setting(self):
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            exact = kernel_settings(torch.float32)
            torch.set_float32_matmul_precision("high")
            assert kernel_settings(torch.float32) != exact
        finally:
            torch.set_float32_matmul_precision(before)

    def test_the_oldest_goes(self, on_cpu, monkeypatch):
        monkeypatch.setattr(replay, "_KEPT", 4)
        for n in (3, 4, 5, 3, 3, 3):
            given = batch(n, n)
            expected = without_programs(monkeypatch, CASES["clip"], *given)
            assert_same_bits(results(CASES["clip"], *given), expected)
            assert len(on_cpu) <= 4
        assert sum(callable(program) for program in on_cpu.values()) == 2

    def test_what_has_a_program_stays_longer(self, programs, monkeypatch):
        monkeypatch.setattr(replay, "_KEPT", 3)
        for n in (1, 1, *range(2, 9)):
            x = torch.ones(n)
            replay.replay("key", [x], lambda x=x: x + 1)
        assert sum(callable(program) for program in programs.values()) == 1 and len(programs) == 3

    def test_a_call_that_fails_leaves_no_program(self, on_cpu, monkeypatch):
        def failing(*given, **options):
            raise MemoryError

        loss, given = CASES["clip"], batch(0)
        results(loss, *given)
        with monkeypatch.context() as patch:
            patch.setattr(triton_backend, "accumulate_gradient", failing)
            with pytest.raises(MemoryError):
                results(loss, *given)
        assert [callable(known) for known in on_cpu.values()] == [True, False]
        for _ in range(2):
            assert_same_bits(results(loss, *given), without_programs(monkeypatch, loss, *given))
        assert all(callable(known) for known in on_cpu.values())


class TestRecorder:
    """Of PyTorch's operators alone."""

    def test_a_program(self):
        def call(x):
            doubled = x.new_empty(3, 2)  # let go of after its last use
            doubled.copy_(x.detach()).mul_(2)
            first, second = doubled.unbind(1)
            torch.empty(7)  # of which nothing comes
            doubled.sum()
            return [first + 1, None, True], torch.add(second, float("inf"), out=x.new_empty(3, dtype=torch.float64))

        x = torch.randn(3, 2)
        with Recorder([x]) as recorder:
            result = call(x)
        program = recorder.program(result)
        assert program.source == """\
def program(t1):
    t2 = allocate((3, 2), (2, 1), dtype=torch.float32, device=device)
    copy__5(t2, t1)
    mul__6(t2, 2)
    t3, t4, = unbind_7(t2, 1)
    t2 = None
    t7 = add_9(t3, 1)
    t3 = None
    t8 = allocate((3,), (1,), dtype=torch.float64, device=device)
    add_11(t4, float_10, out=t8)
    t4 = None
    return ([t7, None, True, ], t8, )"""
        other = torch.randn(3, 2)
        (first, nothing, yes), second = program(other)
        assert_same_bits([first, second], [other[:, 0] * 2 + 1, torch.full((3,), torch.inf, dtype=torch.float64)])
        assert nothing is None and yes is True

    @pytest.mark.parametrize("where", [nullcontext, torch.inference_mode, torch._C._AutoDispatchBelowAutograd])
    @pytest.mark.parametrize("call, why", [
        (lambda x: x * x.sum().item(), "_local_scalar_dense.default tells the host"),
        (lambda x: x * 2 if x.any() else x, "_local_scalar_dense.default tells the host"),
        (lambda x: x[x > 0], "index.Tensor tells the host"),
        (lambda x: x[(x > 0).byte()], "index.Tensor tells the host"),
        (lambda x: x * len((x > 0).nonzero(as_tuple=True)[0]), "nonzero.default tells the host"),
        (lambda x: x * len(torch.where(x > 0)[0]), "nonzero.default tells the host"),
        (lambda x: x.repeat_interleave((x > 0).long()), "tells the host"),
        (lambda x: torch.is_same_size(x, x) * x, "is_same_size.default returns True"),
        (lambda x: x.nonzero(), "nonzero.default tells the host"),
        (lambda x: x * torch.equal(x, x + 1), "equal.default tells the host"),
        (lambda x: x.to("meta"), "goes to another device"),
        (lambda x: x + ELSEWHERE, "a tensor that it was not given"),
        (lambda x: x + torch.tensor(3.0), "a tensor that it was not given"),
        (lambda x: sum([x] * (replay._LONGEST + 1), x), "takes more than"),
    ])  # fmt: skip
    def test_why_there_is_none(self, call, why, where, programs):
        for _ in range(4):
            x = torch.randn(3)
            with warnings.catch_warnings(), where():
                warnings.simplefilter("ignore")  # a mask of bytes
                replay.replay("key", [x], lambda x=x: call(x))
        assert [why in known for known in programs.values()] == [True]

    def test_an_index_of_numbers_is_no_question(self):
        x, index = torch.randn(5, 2), torch.tensor([3, 1])
        with Recorder([x, index]) as recorder:
            result = x[index]
        assert_same_bits([recorder.program(result)(2 * x, index + 1)], [2 * x[[4, 2]]])

    def test_all_of_a_call_is_recorded_by_other_threads_of_autograd_too(self):
        def call(x):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                return torch.autograd.grad((leaf**3).sum(), leaf)[0]

        x = torch.randn(4)
        with Recorder([x]) as recorder:
            result = call(x)
        assert_same_bits([recorder.program(result)(2 * x)], [12 * x**2])

    def test_a_tensor_that_takes_the_place_of_a_dead_one(self):
        """Python may give it the same number: a name is of one tensor."""

        def call(x):
            for _ in range(50):
                x = x + 1
            return x

        x = torch.zeros(3)
        with Recorder([x]) as recorder:
            result = call(x)
        assert_same_bits([recorder.program(result)(x + 1)], [x + 51])

    def test_forms_are_told_apart(self, programs):
        memory = torch.arange(40.0)
        forms = [
            memory[:12].view(3, 4), memory[:12].view(4, 3), memory[:12].view(4, 3).t(), memory[1:13].view(3, 4),
            memory[:12].view(3, 4).double(), memory[:12].view(3, 4).half(), memory[:12].view(3, 4).bfloat16(), None,
        ]  # fmt: skip
        for _ in range(4):
            for form in forms:
                made = replay.replay("key", [form, memory], lambda form=form: memory if form is None else form.relu())
                assert_same_bits([made], [memory if form is None else form.relu()])
        assert len(programs) == len(forms)

    def test_effects_are_kept(self):
        def call(x, y):
            torch._assert_async(x.sum(), "the sum is 0")
            x.add_(y)
            x.t().mul_(2)

        x, y, given = torch.ones(2, 3), torch.ones(2, 3), torch.full((2, 3), 2.0)
        with Recorder([x, y]) as recorder:
            result = call(x, y)
        program = recorder.program(result)
        program(given, y)
        assert torch.equal(given, torch.full((2, 3), 6.0))
        with pytest.raises(RuntimeError, match="the sum is 0"):
            program(torch.zeros(2, 3), y)

    def test_strides_of_what_is_allocated(self):
        def call(x):
            return x.new_empty_strided((2, 3), (1, 2)).copy_(x), torch.empty_like(x.t()).copy_(x.t())

        x = torch.randn(2, 3)
        with Recorder([x]) as recorder:
            result = call(x)
        made = recorder.program(result)(x)
        assert [t.stride() for t in made] == [t.stride() for t in result] == [(1, 2), (1, 3)]
        assert_same_bits(made, result)

    def test_what_the_call_lets_go_of_is_gone(self):
        with Recorder([torch.ones(2)]):
            first = torch.empty(3)
            second = first * 2
            gone = weakref.ref(first), weakref.ref(second)
            del first, second
            assert [each() for each in gone] == [None, None]

    def test_structures_that_are_returned(self):
        x = torch.randn(3, 2)
        with Recorder([x]) as recorder:
            result = x.max(0), [x.shape]
        (values, indices), [shape] = recorder.program(result)(2 * x)
        assert_same_bits([values, indices], list((2 * x).max(0)))
        assert shape == (3, 2)

    def test_who_listened_before_listens_again(self):
        heard = []
        kernel = {(1,): lambda *given: None}
        with heard_by(lambda launch: heard.append("outer")):
            with heard_by(lambda launch: heard.append("inner")):
                run_kernel(kernel, (1,), 7)
            run_kernel(kernel, (1,), 7)
        run_kernel(kernel, (1,), 7)
        assert heard == ["inner", "outer"]

    def test_threads(self, programs, monkeypatch):
        monkeypatch.setattr(replay, "_KEPT", 3)
        wrong = []
        interval = sys.getswitchinterval()

        def steps(seed: int) -> None:
            try:
                for step in range(1000):
                    x = torch.full((1 + (seed + step // 3) % 5,), float(step))
                    assert torch.equal(replay.replay("key", [x], lambda x=x: x * 2 + 1), x * 2 + 1)
                    assert len(programs) <= 3
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=steps, args=(seed,)) for seed in range(6)]
        try:
            sys.setswitchinterval(1e-6)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert not wrong


@pytest.mark.parametrize("name", REPEATED)
class TestGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_programs_do_what_the_calls_do(self, name, dtype, programs, worked_out, monkeypatch):
        def loss(x, y, *others, **options):
            return CASES[name](x.to(dtype), y.to(dtype), *others, **options)

        # Of sizes for which other tests compile the same kernels.
        assert_repeated(loss, programs, worked_out, monkeypatch, 257, 48, "cuda")

    def test_they_take_no_more_memory(self, name, programs):
        x, y, labels = batch(0, 600, 130, "cuda")
        peaks = []
        for _ in range(4):  # worked out, recorded, repeated
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            results(CASES[name], x, y, labels)
            peaks.append(torch.cuda.max_memory_allocated() - before)
        assert max(peaks) == peaks[0]
