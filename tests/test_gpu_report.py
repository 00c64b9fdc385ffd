"""The GPU report: its time limits, what is on disk when, and that no process outlives its stage."""

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench.__main__ import options
from bench.commands import run
from bench.gpu_report import Process, Report, parse_arguments
from bench.gpu_stages import Setting, Stage, all_stages

FACTS = {"GPU": "none", "torch": "2.11"}
HANGS = 1e9


def command(name, seconds=1.0, status=0, output=""):
    """As FakeProcess reads it."""
    return "python", "-m", name, str(seconds), str(status), output or f"output of {name}\n"


class Machine:
    """A clock, and the processes that it passes by; those of ``deaths`` take the report with them."""

    def __init__(self, kill_seconds=0.5, deaths=None):
        self.now, self.kill_seconds, self.deaths = 1000.0, kill_seconds, deaths or {}
        self.started, self.alive = [], set()

    def clock(self):
        return self.now

    def start(self, command, log):
        self.started.append((command[2], self.now))
        self.alive.add(command[2])
        with log.open("a") as file:
            file.write(command[5])
        return FakeProcess(self, command[2], float(command[3]), int(command[4]))


class FakeProcess:
    def __init__(self, machine, name, seconds, status):
        self.machine, self.name, self.seconds, self.status = machine, name, seconds, status

    def wait(self, seconds):
        if self.name in self.machine.deaths:
            raise self.machine.deaths[self.name]
        self.machine.now += min(self.seconds, seconds)
        if self.seconds > seconds:
            return None
        self.machine.alive.discard(self.name)
        return self.status

    def end(self):
        if self.name in self.machine.alive:
            self.machine.now += self.machine.kill_seconds
            self.machine.alive.discard(self.name)


def stage(name, *commands, seconds=60.0, least=10.0, **options):
    return Stage(name, commands or (command(name),), seconds, least, **options)


def report(folder, stages, seconds=360.0, machine=None, **options):
    machine = machine or Machine()
    made = Report(stages, folder, FACTS, seconds, clock=machine.clock, start=machine.start, **options)
    return made, machine


def outcomes(made):
    return [result.outcome for result in made.results]


def archived(folder, name):
    with tarfile.open(folder / "report.tar.gz") as archive:
        return archive.extractfile(name).read().decode()


def test_a_stage_that_hangs_ends_at_its_limit_and_the_next_one_runs(tmp_path):
    stages = [stage("stuck", command("hangs", HANGS), command("not reached")), stage("next")]
    made, machine = report(tmp_path, stages)
    assert made.run() == 0
    assert outcomes(made) == ["out of time", "passed"]
    assert [name for name, _ in machine.started] == ["hangs", "next"]
    assert machine.started[1][1] == 1000 + 60 + machine.kill_seconds
    assert not machine.alive


def test_no_stage_starts_with_less_than_its_least(tmp_path):
    stages = [stage("long", command("long", 95.0), seconds=100), stage("second", least=6), stage("third", least=5)]
    made, machine = report(tmp_path, stages, seconds=100)
    assert made.run() == 0
    assert outcomes(made) == ["passed", "skipped", "passed"]
    assert "5 s were left, it needs 6" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("lengths", [[HANGS] * 5, [50, HANGS, 3, HANGS, 70], [59.9] * 5, [1] * 5])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("seconds", [12.0, 100.0, 175.0, 1000.0])
def test_the_whole_ends_in_time(tmp_path, seconds, scale, lengths):
    stages = [stage(f"stage{i}", command(f"command{i}", length)) for i, length in enumerate(lengths)]
    made, machine = report(tmp_path, stages, seconds=seconds, scale=scale)
    made.run()
    assert machine.started and all(start <= 1000 + seconds - 10 for _, start in machine.started)
    assert machine.now <= 1000 + seconds + machine.kill_seconds
    assert len(made.results) == 5 and not machine.alive


def test_limits_follow_the_time_that_is_given(tmp_path):
    made, machine = report(tmp_path, [stage("stuck", command("hangs", HANGS)), stage("next")], seconds=720, scale=2.0)
    made.run()
    assert machine.started[1][1] == 1000 + 120 + machine.kill_seconds


def test_a_crash_is_recorded_and_the_rest_goes_on(tmp_path):
    crash = stage("crash", command("first", 1.0, -11, "last words\n"), command("second", 1.0), command("third", 1.0, 2))
    made, machine = report(tmp_path, [crash, stage("next"), stage("odd", command("odd", 1.0, 5), accepted=(0, 5))])
    assert made.run() == 1
    assert outcomes(made) == ["failed", "passed", "passed"]
    assert [name for name, _ in machine.started] == ["first", "second", "third", "next", "odd"]
    summary = (tmp_path / "summary.md").read_text()
    assert "killed by SIGSEGV" in summary and "exit status 2" in summary and "last words" in summary
    assert archived(tmp_path, "summary.md") == summary


def test_what_is_missing_skips_a_stage(tmp_path):
    made, machine = report(tmp_path, [stage("a", files=("tests/no_such_file.py",)), stage("b", modules=("no_module",))])
    assert made.run() == 0
    assert outcomes(made) == ["skipped"] * 2 and not machine.started
    summary = (tmp_path / "summary.md").read_text()
    assert "needs tests/no_such_file.py" in summary and "needs the module no_module" in summary


@pytest.mark.parametrize("death", [KeyboardInterrupt(), SystemExit(143), RuntimeError("disk full")], ids=repr)
def test_what_was_done_is_on_disk_when_the_report_dies(tmp_path, death):
    stages = [stage("one"), stage("two", command("two", 1.0, 3)), stage("three"), stage("four")]
    made, machine = report(tmp_path, stages, machine=Machine(deaths={"three": death}))
    with pytest.raises(type(death)):
        made.run()
    assert not machine.alive and sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "report.tar.gz", "summary.md",
    ]  # fmt: skip
    summary = (tmp_path / "summary.md").read_text()
    table = [line.split(" | ")[1] for line in summary.splitlines() if line.startswith("| ") and line.count("|") == 5]
    assert table[2:] == ["passed", "failed", "interrupted", "not started"]
    assert archived(tmp_path, "summary.md") == summary
    assert archived(tmp_path, "logs/three.log") == "output of three\n"


def test_summary_and_archive_are_written_after_every_stage(tmp_path):
    """Each process finds on disk what the stages before it left."""
    found = []

    class Looking(Machine):
        def start(self, command, log):
            with tarfile.open(tmp_path / "report.tar.gz") as archive:
                found.append([name for name in archive.getnames() if name.startswith("logs/")])
            assert archived(tmp_path, "summary.md").count("| passed |") == len(found) - 1
            return super().start(command, log)

    made, _ = report(tmp_path, [stage("one"), stage("two"), stage("three")], machine=Looking())
    made.run()
    assert found == [[], ["logs/one.log"], ["logs/one.log", "logs/two.log"]]
    assert "| passed |" in (tmp_path / "summary.md").read_text()


def test_tests_that_failed_before_the_time_was_up_are_a_failure(tmp_path):
    class Testing(Machine):
        def start(self, command, log):
            (tmp_path / "results" / "tests").mkdir(parents=True)
            (tmp_path / "results" / "tests" / "outcomes.csv").write_text(
                "test,outcome,seconds,error\na::one,passed,1.0,\na::two,failed,1.0,assert 1 == 2\na::three,fail"
            )
            return super().start(command, log)

    made, _ = report(tmp_path, [stage("tests", command("tests", HANGS))], machine=Testing())
    assert made.run() == 1
    assert outcomes(made) == ["failed, out of time"]
    summary = (tmp_path / "summary.md").read_text()
    assert "1 passed, 1 failed" in summary and "- `a::two`: assert 1 == 2" in summary and "a::three" not in summary


def test_what_is_huge_stays_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.gpu_summary.LOG_BYTES", 10)
    monkeypatch.setattr("bench.gpu_summary.FILE_BYTES", 10)
    made, _ = report(tmp_path, [stage("one", command("one", 1.0, 0, "0123456789abcdef"))])
    (tmp_path / "results" / "small.csv").write_text("a,b\n")
    (tmp_path / "results" / "large.csv").write_text("a" * 11)
    made.run()
    with tarfile.open(tmp_path / "report.tar.gz") as archive:
        assert archive.getnames() == ["summary.md", "results/small.csv", "logs/one.log", "left_out.txt"]
    assert archived(tmp_path, "logs/one.log") == "6789abcdef"
    assert archived(tmp_path, "left_out.txt") == "results/large.csv: 11 B\nlogs/one.log: the first 6 B\n"


# -- real processes -----------------------------------------------------------------------------------------------

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", '''
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("child is deaf", flush=True)
time.sleep(600)
'''])
print("child", child.pid, flush=True)
time.sleep({seconds})
"""


def is_gone(pid: int) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("seconds, outcome", [(600, "out of time"), (1.5, "passed")])
def test_a_child_that_ignores_sigterm_is_gone_with_its_stage(tmp_path, capfdbinary, seconds, outcome):
    command = (sys.executable, "-c", PARENT.format(seconds=seconds))
    began = time.monotonic()
    made = Report([stage("deaf", command, seconds=4, least=1)], tmp_path, FACTS, 60)
    assert made.run() == 0
    assert outcomes(made) == [outcome] and time.monotonic() - began < 4 + 5
    log = (tmp_path / "logs" / "deaf.log").read_text()
    assert "child is deaf" in log and b"child is deaf" in capfdbinary.readouterr().out
    pid = int(log.split("child ")[1].split()[0])
    assert is_gone(pid)


def test_a_process_that_is_told_to_end_ends_its_stage_first(tmp_path):
    """As when the machine is taken back: SIGTERM, and what there is has to be on disk."""
    script = f"""
import signal, sys
from pathlib import Path
from bench.gpu_report import Report, leave
from bench.gpu_stages import Stage
signal.signal(signal.SIGTERM, leave)
sleeper = (sys.executable, "-c", "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)")
Report([Stage("sleeps", (sleeper,), 60, 1)], Path({str(tmp_path)!r}), {{}}, 60).run()
"""
    running = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)
    for line in running.stdout:
        if line.startswith(b"pid "):
            break
    running.send_signal(signal.SIGTERM)
    running.stdout.close()
    assert running.wait(20) == 128 + signal.SIGTERM
    assert "interrupted" in archived(tmp_path, "summary.md") and "pid" in archived(tmp_path, "logs/sleeps.log")
    end = time.monotonic() + 10
    while not has_ended(int(line.split()[1])):
        assert time.monotonic() < end


def has_ended(pid: int) -> bool:
    """Also if nobody has asked for its exit status yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_process_tells_how_it_ended(tmp_path):
    for code, expected in (("raise SystemExit(3)", 3), ("import os; os.abort()", -signal.SIGABRT)):
        process = Process((sys.executable, "-c", code), tmp_path / "log", dict(os.environ))
        assert process.wait(60) == expected
        process.end()


# -- the stages themselves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry", [False, True])
def test_every_command_knows_its_options(dry):
    """A rehearsal runs its own; what only a GPU sees would show there, after the time was lent."""
    gpu_configs = pytest.importorskip("bench.gpu_configs")  # which imports triton
    from bench import gpu_profile, gpu_warmup

    stages = all_stages(Setting(Path("results"), 16, dry))
    assert [one.name for one in stages] == ["smoke", "tests", "speed", "profile", "baselines", "configs", "rest"]
    assert all(0 < one.least < one.seconds for one in stages)
    parsers = {f"bench.{module.__name__.split('.')[-1]}": module for module in (gpu_configs, gpu_profile, gpu_warmup)}
    of_run = {f"--{name.replace('_', '-')}" for name in options(run)}
    seen = set()
    for words in (words for one in stages for words in one.commands):
        seen.add(words[2])
        assert ("cuda" in words) <= (not dry)
        if words[2] in parsers:
            assert parsers[words[2]].parse_arguments(words[3:]).device == ("cpu" if dry else "cuda")
        elif words[2] == "bench":
            given = {word.replace("--no-", "--") for word in words if word.startswith("--")}
            assert words[3] == "run" and given <= of_run
        else:
            assert words[2] == "pytest"
    assert seen == {"pytest", "bench", *parsers}


def test_workers_leave_two_cores():
    assert [Setting(Path(), cores, False).workers for cores in (1, 2, 4, 16, 64)] == [1, 1, 2, 14, 14]


def test_arguments(capsys, tmp_path):
    assert parse_arguments([]).minutes == 6 and not parse_arguments([]).dry
    assert parse_arguments(["--stages", "speed,profile"]).stages == ["speed", "profile"]
    for wrong, told in (
        (["--dry"], "--dry needs --output"),
        (["--stages", "speed,nothing"], "no such stage: nothing"),
        (["--minutes", "0"], "--minutes has to be positive"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments(wrong)
        assert told in capsys.readouterr().err
