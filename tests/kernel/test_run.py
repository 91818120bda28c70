"""``mpu-notify run`` as a user meets it."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import installation

from .conftest import StartStandIn
from .harness import SECONDS, eventually

NOBODY = 65534
TOKEN_NAME = "MPU_NOTIFY_TEST_TOKEN"  # noqa: S105 - marks the processes of a test


class Run:
    """Starts `mpu-notify` and knows every process that came of it, by a mark in its environment."""

    def __init__(self) -> None:
        self.token = uuid.uuid4().hex
        self.environment = {**os.environ, TOKEN_NAME: self.token}

    def __call__(self, *arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        command = ["mpu-notify", "run", *arguments]
        settings = {"capture_output": True, "text": True, "timeout": SECONDS, "env": self.environment, **options}
        return subprocess.run(command, check=False, **settings)  # type: ignore[call-overload,no-any-return]

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        command = ["mpu-notify", "run", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=self.environment)

    def processes(self) -> list[int]:
        """Host PIDs of all that is alive of it."""
        mark = f"{TOKEN_NAME}={self.token}".encode()
        return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if mark in _environment(entry)]

    def named(self, name: str) -> int:
        """The one process that executes a program of this name."""
        (pid,) = [pid for pid in self.processes() if _words(pid)[0] == name]
        return pid


def _environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""  # it ended


def _words(pid: int) -> list[str]:
    return [Path(word).name for word in Path(f"/proc/{pid}/cmdline").read_text().split("\0")]


@pytest.fixture
def run() -> Iterator[Run]:
    runner = Run()
    yield runner
    eventually(lambda: not runner.processes(), "nothing is left running")


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_the_exit_status_is_the_commands(run: Run, status: int) -> None:
    assert run("sh", "-c", f"exit {status}").returncode == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGINT])
def test_a_signal_that_ends_the_command_ends_us_the_same_way(run: Run, number: signal.Signals) -> None:
    assert run("sh", "-c", f"kill -{int(number)} $$").returncode == -number


def test_a_missing_program_is_127_and_named(run: Run) -> None:
    done = run("no-such-program", "argument")
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr == "mpu-notify: cannot run no-such-program: No such file or directory\n"


def test_a_program_that_cannot_be_executed_is_126_and_named(run: Run) -> None:
    done = run("/etc/passwd")
    assert (done.returncode, done.stderr) == (126, "mpu-notify: cannot run /etc/passwd: Permission denied\n")


def test_a_program_without_a_name_is_127_and_named(run: Run) -> None:
    done = run("")
    assert (done.returncode, done.stderr) == (127, "mpu-notify: cannot run '': No such file or directory\n")


def test_a_script_without_an_interpreter_line_is_126_where_there_is_no_sh(run: Run, tmp_path: Path) -> None:
    script, nothing = tmp_path / "script", tmp_path / "nothing"
    script.touch(mode=0o755)
    nothing.touch(mode=0o600)
    hide = f'mount --bind {nothing} "$(readlink -f /bin/sh)" && exec mpu-notify run {script}'
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", hide],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=run.environment,  # type: ignore[call-overload]
    )
    assert (done.returncode, done.stderr) == (126, f"mpu-notify: cannot run {script}: Exec format error\n")


@pytest.mark.parametrize("arguments", [[], ["--"], ["--no-such-option", "true"], ["--translate", "maybe", "true"]])
def test_wrong_usage_is_2_and_explained(run: Run, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(("usage: mpu-notify", "mpu-notify: run: name a command"))


def test_a_missing_control_node_is_1_and_named(run: Run) -> None:
    done = run("--device", "/no/such/node", "true")
    assert done.returncode == 1
    assert done.stderr.startswith("mpu-notify: no control node at /no/such/node: ")
    assert done.stderr.count("\n") == 1


def test_a_log_file_that_cannot_be_opened_is_1_and_named(run: Run) -> None:
    done = run("--log-file", "/no/such/directory/log", "true")
    assert done.returncode == 1
    assert "/no/such/directory/log" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_has_a_pid_namespace_and_proc_of_its_own(run: Run) -> None:
    done = run("sh", "-c", "echo $$; ls -d /proc/[0-9]* | wc -l; readlink /proc/self/ns/pid")
    pid, processes, namespace = done.stdout.split()
    assert pid == "2", "behind the init"
    assert int(processes) <= 5, "init, sh and what sh started"
    assert namespace != str(Path("/proc/self/ns/pid").readlink())


def test_input_output_environment_and_arguments_pass_through(run: Run) -> None:
    done = run("sh", "-c", 'cat; echo "$0 $1 $' + TOKEN_NAME + '"; echo loud >&2', "zero", "--", input="in\n")
    assert (done.stdout, done.stderr) == (f"in\nzero -- {run.token}\n", "loud\n")


def _signals(line: str) -> int:
    """A line of /proc/PID/status as a mask, without the two signals that are the C library's own (nptl(7))."""
    return int(line.split()[1], 16) & ~(0b11 << 31)


def test_the_command_has_default_signals(run: Run) -> None:
    done = run("sh", "-c", "grep -E '^Sig(Blk|Ign)' /proc/self/status")
    assert {_signals(line) for line in done.stdout.splitlines()} == {0}


def test_what_the_command_leaves_behind_ends_with_it(run: Run) -> None:
    begun = time.monotonic()
    assert run("sh", "-c", "sleep 1000 & setsid sleep 1000 & exit 3").returncode == 3
    assert time.monotonic() - begun < SECONDS / 2


def test_signals_are_passed_on(run: Run) -> None:
    with run.start("sh", "-c", "trap 'echo got it; exit 5' USR1; echo up; while :; do sleep 0.01; done") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "got it\n"
        assert process.wait(SECONDS) == 5


def test_killing_us_ends_everything(run: Run) -> None:
    with run.start("sh", "-c", "echo up; sleep 1000") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert len(run.processes()) >= 4
        process.kill()
    eventually(lambda: not run.processes(), "nothing is left running")


def _on_a_terminal(run: Run, *command: str) -> tuple[int, int]:
    """A child with a terminal of its own; returns its pid and the terminal's other end."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe("mpu-notify", ["mpu-notify", "run", *command], run.environment)  # noqa: S606
    return pid, terminal


def _read_until(terminal: int, wanted: bytes) -> None:
    seen = b""
    while wanted not in seen:
        seen += os.read(terminal, 1024)


def test_ctrl_c_reaches_the_command_once(run: Run) -> None:
    script = "n=0; trap 'n=$((n+1))' INT; echo up; sleep 0.5; sleep 0.5; sleep 0.2; exit $((40+n))"
    pid, terminal = _on_a_terminal(run, "sh", "-c", script)
    _read_until(terminal, b"up\r\n")
    os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 41
    os.close(terminal)


def test_an_interactive_shell_has_the_terminal(run: Run) -> None:
    pid, terminal = _on_a_terminal(run, "bash", "--norc", "-i")
    os.write(terminal, b"test -t 0 && exit 4\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    os.close(terminal)


def test_a_terminal_that_hangs_up_ends_the_command(run: Run) -> None:
    pid, terminal = _on_a_terminal(run, "sh", "-c", "echo up; sleep 1000")
    _read_until(terminal, b"up\r\n")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGHUP


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGRTMIN + 1])
def test_unusual_signals_are_passed_on_too(run: Run, number: int) -> None:
    handle = f"signal.signal({int(number)}, lambda *_: sys.exit(6))"
    script = f"import signal, sys; {handle}; print('up', flush=True); signal.pause()"
    with run.start(sys.executable, "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.wait(SECONDS) == 6


def test_children_ignored_by_whoever_started_us_do_no_harm(run: Run) -> None:
    ignoring = "import os, signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execvp('mpu-notify', {})"
    command = ["mpu-notify", "run", "grep", "SigIgn", "/proc/self/status"]
    done = subprocess.run(
        [sys.executable, "-c", ignoring.format(command)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=run.environment,  # type: ignore[call-overload]
    )
    assert done.returncode == 0
    assert _signals(done.stdout) == 1 << (signal.SIGCHLD - 1), "the command has them ignored as well"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_files_stay_closed(run: Run, closed: str, tmp_path: Path) -> None:
    said = tmp_path / "said"
    script = f"mpu-notify run sh -c 'ls -l /proc/self/fd >{said} 2>&1; exit 3' {closed}"
    done = subprocess.run(["sh", "-c", script], env=run.environment, timeout=SECONDS, check=False)
    assert done.returncode == 3
    assert "socket" not in said.read_text()


def test_a_script_without_an_interpreter_line_is_run_by_sh(run: Run, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('exit "$1"\n')
    script.chmod(0o755)
    assert run(script, "5").returncode == 5


@pytest.mark.parametrize("under_way", [0, 40])
@pytest.mark.parametrize("limit", [6, 8, 10, 12, 16])
def test_with_few_files_it_works_or_says_so_in_one_line(run: Run, limit: int, under_way: int) -> None:
    """Those on their way through sockets of the same user count as well."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [ours.fileno()] * under_way)
        _with_few_files(run, limit)


def _with_few_files(run: Run, limit: int) -> None:
    done = subprocess.run(
        ["sh", "-c", f"ulimit -n {limit}; exec mpu-notify run sh -c 'exit 3'"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=run.environment,  # type: ignore[call-overload]
    )
    assert done.returncode == 3 or (done.returncode == 1 and done.stderr.count("\n") == 1), done.stderr


def test_an_interrupt_at_any_moment_of_the_start_is_an_interrupt(run: Run) -> None:
    statuses = set()
    for number in range(16):
        with run.start("sleep", "1000") as process:
            maps = Path(f"/proc/{process.pid}/maps")
            eventually(lambda maps=maps: "_native" in maps.read_text(), "our own code runs")
            time.sleep(0.005 * number)
            process.send_signal(signal.SIGINT)
            statuses.add(process.wait(SECONDS))
    assert statuses <= {-signal.SIGINT, 130}


def test_a_stopped_supervisor_does_not_keep_us_from_ending(
    standin: StartStandIn, run: Run, caller_program: Path
) -> None:
    asking = Asking(run, standin().control_node, caller_program)
    os.kill(asking.supervisor, signal.SIGSTOP)
    try:
        assert asking.end() == 0
    finally:
        os.kill(asking.supervisor, signal.SIGCONT)


def test_outside_the_initial_pid_namespace_run_refuses_and_says_why(run: Run) -> None:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "mpu-notify", "run", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=run.environment)
    assert done.returncode == 1
    assert done.stderr.startswith("mpu-notify: not in the initial PID namespace")
    assert done.stderr.count("\n") == 1


def test_run_inside_run_refuses_and_says_why(run: Run) -> None:
    done = run("mpu-notify", "run", "true")
    assert done.returncode == 1
    assert "not in the initial PID namespace" in done.stderr


def test_without_root_and_user_namespaces_it_says_what_is_needed(run: Run) -> None:
    forbid = 'echo 0 >/proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh", "mpu-notify", "run", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=run.environment)
    assert done.returncode == 1
    assert "run needs root, or user namespaces" in done.stderr
    assert done.stderr.count("\n") == 1


def as_nobody(run: Run, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]
    return subprocess.run(
        [*become, *installation.command(), *arguments],
        env=run.environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        cwd="/",  # type: ignore[call-overload]
    )


def test_an_ordinary_user_sees_its_own_gpu_processes(standin: StartStandIn, run: Run) -> None:
    node = standin("--era", "host").control_node
    python = installation.PYTHON
    inner = (
        f"id -u; {python} -m mpu_notify.standin.workload mine 64 --device {node} & sleep 1;"
        f" {python} -m mpu_notify.cli.main ps --json --device {node}; kill $!"
    )
    done = as_nobody(run, "run", "--device", node, "--", "sh", "-c", inner)
    assert (done.returncode, done.stderr) == (0, "")
    user, up, *listing = done.stdout.splitlines()
    assert (user, up) == (str(NOBODY), "up")
    (row,) = json.loads("\n".join(listing))
    assert (row["name"], row["memory_bytes"]) == ("mine", 64 << 20)
    assert 2 < row["pid"] < 10


def test_the_supervised_calls_are_logged_with_pids_before_and_after(
    standin: StartStandIn, run: Run, caller_program: Path, tmp_path: Path
) -> None:
    node, log = standin("--era", "host").control_node, tmp_path / "log"
    options = ["--device", node, "--log-level", "debug", "--log-format", "json", "--log-file", log]
    assert run(*options, "--", caller_program, node.parent, "plain").stdout == "pids= 2\n"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (call,) = [line for line in lines if line["message"] == "call"]
    assert call["level"] == "debug"
    assert call["control"] == "GPU_GET_PIDS"
    assert call["outcome"] == "translated"
    assert call["after"] == [2]
    assert len(call["before"]) == 1
    assert call["before"] != [2]
    assert call["us"] > 0
    assert call["container"].startswith("pid ")
    (ended,) = [line for line in lines if line["message"] == "ended"]
    assert (ended["calls"], ended["translated"]) == (1, 1), "allocations are no RM controls: only one call was stopped"


def test_each_cause_is_warned_of_once(standin: StartStandIn, run: Run, caller_program: Path) -> None:
    node = standin().control_node
    twice = 'for i in 1 2 3; do "$@"; done'
    done = run("--device", node, "--", "sh", "-c", twice, "sh", caller_program, node.parent, "flags")
    assert done.stdout.count("status=0x1f") == 3
    warnings = [line for line in done.stderr.splitlines() if " warning " in line]
    assert len(warnings) == len(done.stderr.splitlines()) == 1
    assert "flags" in warnings[0]


class Asking:
    """A caller that asks on demand inside `run`."""

    def __init__(self, run: Run, node: Path, caller: Path) -> None:
        self.run = run
        self.process = run.start("--device", node, "--", caller, node.parent, "on_demand")
        assert self.line() == "up"
        self.caller_host_pid = run.named("caller")
        self.monitor = run.named("mpu-notify-monitor")
        self.supervisor = int(Path(f"/proc/{self.monitor}/stat").read_text().rpartition(")")[2].split()[1])

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("x")
        self.process.stdin.flush()
        return self.line()

    def end(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        with self.process:
            return self.process.wait(SECONDS)


def test_a_killed_supervisor_leaves_the_drivers_own_answers(
    standin: StartStandIn, run: Run, caller_program: Path
) -> None:
    asking = Asking(run, standin("--era", "host").control_node, caller_program)
    assert asking.ask() == "pids= 2"
    os.kill(asking.supervisor, signal.SIGKILL)
    eventually(lambda: asking.ask() == f"pids= {asking.caller_host_pid}", "the driver's own answer comes")
    assert asking.process.stderr is not None
    said = "mpu-notify-monitor: the supervisor has ended: calls go to the driver untranslated\n"
    assert asking.process.stderr.readline() == said
    asking.ask()
    _, more = asking.process.communicate(timeout=SECONDS)
    assert (asking.process.returncode, more) == (0, "")


def test_a_stopped_supervisor_delays_one_call_by_a_second_at_most_and_may_come_back(
    standin: StartStandIn, run: Run, caller_program: Path
) -> None:
    asking = Asking(run, standin("--era", "host").control_node, caller_program)
    os.kill(asking.supervisor, signal.SIGSTOP)
    begun = time.monotonic()
    assert [asking.ask() for _ in range(5)] == [f"pids= {asking.caller_host_pid}"] * 5
    assert time.monotonic() - begun < 2
    os.kill(asking.supervisor, signal.SIGCONT)
    eventually(lambda: asking.ask() == "pids= 2", "translation is back")
    assert asking.process.stdin is not None
    _, log = asking.process.communicate(timeout=SECONDS)
    assert log.count(" warning ") == log.count("outcome=supervisor_silent") == 1, log
