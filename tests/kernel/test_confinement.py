"""What supervisor and monitor may still ask of the kernel: their own seccomp filters, as programs and as put on."""

from __future__ import annotations

import errno
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pyseccomp
import pytest

import mpu_notify
from mpu_notify.notify import confinement
from tests import installation
from tests.unit import bpf

from .harness import SECONDS, compile_c

ALLOW = 0x7FFF0000  # SECCOMP_RET_ALLOW
NOT_THERE = 0x00050000 | errno.ENOSYS  # SECCOMP_RET_ERRNO

X86_64, I386 = 0xC000003E, 0x40000003  # AUDIT_ARCH_*, linux/audit.h
X32 = 0x40000000
SYSCALLS = range(512)

PROT_EXEC, CLONE_THREAD, CLONE_NEWUSER, CLONE_NEWNS, CLONE_NEWTIME = 4, 0x10000, 0x10000000, 0x20000, 0x80
RM_CONTROL, NS_GET_PARENT = 0xC020462A, 0xB702

#: What an intruder would like, and none of us needs.
NOBODYS = [
    *("ptrace", "process_vm_writev", "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "keyctl", "add_key"),
    *("mount", "umount2", "pivot_root", "chroot", "fsopen", "move_mount", "open_tree", "unshare", "clone3"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "reboot", "swapon", "personality", "quotactl"),
    *("setuid", "setgid", "setresuid", "setgroups", "setns", "chmod", "chown", "rename", "link", "symlink", "mknod"),
    *("mkdir", "rmdir", "truncate", "creat", "open_by_handle_at", "name_to_handle_at", "acct", "settimeofday"),
    *("modify_ldt", "iopl", "ioperm", "syslog", "execveat", "msgget", "shmget", "semget", "setxattr", "sethostname"),
]

#: What a supervisor has no use for that starts no monitor.
MONITORS = [
    *("execve", "fork", "vfork", "kill", "tgkill", "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "kcmp"),
    *("process_vm_readv", "pwrite64", "bind", "listen", "unlink", "seccomp", "prctl", "capset"),
]


def number(name: str) -> int:
    return pyseccomp.resolve_syscall(pyseccomp.Arch.X86_64, name)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Each filter as the kernel is given it, for x86-64."""
    directory = tmp_path_factory.mktemp("confine")
    source = directory / "print_filter.c"
    source.write_text(
        '#include "confine.h"\n#include <stdio.h>\n'
        "int main(void)\n{\n    (void)mpu_confine_monitor;\n"
        "    return fwrite(CONFINE_FILTER, sizeof(CONFINE_FILTER), 1, stdout) != 1;\n}\n"
    )
    csrc = Path(mpu_notify.__file__).parent.parent / "csrc"
    program = compile_c(source, directory, f"-I{csrc}")
    return {
        "alone": confinement.build("x86_64", starts_monitors=False),
        "with monitors": confinement.build("x86_64", starts_monitors=True),
        "monitor": subprocess.check_output([program]),
    }


pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers here are those of x86-64")
EACH = ["alone", "with monitors", "monitor"]


def verdict(program: bytes, name: str, *args: int) -> int:
    return bpf.run(program, number(name), X86_64, args)


@pytest.mark.parametrize("whose", EACH)
@pytest.mark.parametrize("name", NOBODYS)
def test_what_none_of_us_needs_is_not_there(programs: dict[str, bytes], whose: str, name: str) -> None:
    assert number(name) >= 0, name
    assert verdict(programs[whose], name) == NOT_THERE


@pytest.mark.parametrize("name", MONITORS)
def test_a_supervisor_that_starts_no_monitor_touches_no_other_process(programs: dict[str, bytes], name: str) -> None:
    assert verdict(programs["alone"], name) == NOT_THERE
    assert verdict(programs["with monitors"], name) == ALLOW


@pytest.mark.parametrize("name", ["execve", "fork", "vfork", "kill", "prctl", "capset", "process_vm_writev"])
def test_the_monitor_executes_nothing_and_signals_nobody(programs: dict[str, bytes], name: str) -> None:
    assert verdict(programs["monitor"], name) == NOT_THERE


@pytest.mark.parametrize("whose", EACH)
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, 38, 40])
def test_there_are_no_sockets_but_unix_ones(programs: dict[str, bytes], whose: str, family: int) -> None:
    assert verdict(programs[whose], "socket", family, socket.SOCK_DGRAM, 0) == NOT_THERE
    assert verdict(programs[whose], "socket", socket.AF_UNIX, socket.SOCK_DGRAM, 0) == ALLOW


@pytest.mark.parametrize(
    ("flags", "alone", "others"),
    [
        (os.O_RDONLY | os.O_CLOEXEC, ALLOW, ALLOW),
        (os.O_RDWR | os.O_CLOEXEC, NOT_THERE, ALLOW),
        (os.O_WRONLY, NOT_THERE, ALLOW),
        (os.O_RDONLY | os.O_CREAT, NOT_THERE, NOT_THERE),
        (os.O_RDONLY | os.O_TRUNC, NOT_THERE, NOT_THERE),
        (os.O_RDWR | os.O_TMPFILE, NOT_THERE, NOT_THERE),
        (os.O_RDONLY | os.O_DIRECTORY, ALLOW, ALLOW),
    ],
)
def test_files_are_opened_and_never_made(programs: dict[str, bytes], flags: int, alone: int, others: int) -> None:
    answers = {whose: verdict(program, "openat", -100 & 2**64 - 1, 0, flags) for whose, program in programs.items()}
    assert answers == {"alone": alone, "with monitors": others, "monitor": others}


@pytest.mark.parametrize("flag", [CLONE_NEWUSER, CLONE_NEWNS, CLONE_NEWTIME, 0x7E020000])
def test_nobody_makes_namespaces(programs: dict[str, bytes], flag: int) -> None:
    assert {verdict(program, "clone", flag | 17) for program in programs.values()} == {NOT_THERE}


def test_threads_may_be_made_and_processes_only_where_they_are_needed(programs: dict[str, bytes]) -> None:
    assert {verdict(program, "clone", CLONE_THREAD | 0xF00) for program in programs.values()} == {ALLOW}
    forks = {whose: verdict(program, "clone", 17) for whose, program in programs.items()}
    assert forks == {"alone": NOT_THERE, "with monitors": ALLOW, "monitor": ALLOW}


def test_the_one_namespace_to_be_entered_is_a_rootless_callers(programs: dict[str, bytes]) -> None:
    entered = {whose: verdict(program, "setns", 3, CLONE_NEWUSER) for whose, program in programs.items()}
    assert entered == {"alone": NOT_THERE, "with monitors": ALLOW, "monitor": ALLOW}
    assert {verdict(program, "setns", 3, CLONE_NEWNS) for program in programs.values()} == {NOT_THERE}


def test_a_supervisor_alone_makes_no_ioctl_but_those_of_namespaces(programs: dict[str, bytes]) -> None:
    assert verdict(programs["alone"], "ioctl", 3, NS_GET_PARENT) == ALLOW
    assert verdict(programs["alone"], "ioctl", 3, RM_CONTROL) == NOT_THERE


@pytest.mark.parametrize("name", ["mmap", "mprotect"])
def test_the_monitor_has_no_new_executable_memory(programs: dict[str, bytes], name: str) -> None:
    assert verdict(programs["monitor"], name, 0, 4096, 3) == ALLOW
    assert verdict(programs["monitor"], name, 0, 4096, 3 | PROT_EXEC) == NOT_THERE


@pytest.mark.parametrize("whose", EACH)
def test_limits_are_our_own(programs: dict[str, bytes], whose: str) -> None:
    assert verdict(programs[whose], "prlimit64", 0) == ALLOW
    assert verdict(programs[whose], "prlimit64", 1) == NOT_THERE


@pytest.mark.parametrize("whose", EACH)
def test_calls_by_another_abi_are_not_there(programs: dict[str, bytes], whose: str) -> None:
    answers = {bpf.run(programs[whose], call, I386, ()) for call in SYSCALLS}
    answers |= {bpf.run(programs[whose], X32 + call, X86_64, ()) for call in SYSCALLS}
    assert answers == {NOT_THERE}


def test_a_monitor_that_is_started_under_the_supervisors_filter_has_all_of_its_own(programs: dict[str, bytes]) -> None:
    """With arguments that its own filter looks at set so that it allows them."""
    arguments = {"socket": (1,), "setns": (0, CLONE_NEWUSER), "clone": (17,)}
    given = {number(name): args for name, args in arguments.items()}
    own = [call for call in SYSCALLS if bpf.run(programs["monitor"], call, X86_64, given.get(call, ())) == ALLOW]
    assert len(own) > 60
    lacking = [call for call in own if bpf.run(programs["with monitors"], call, X86_64, given.get(call, ())) != ALLOW]
    assert lacking == []


_TRY = """
import ctypes, os, socket, sys
from mpu_notify.notify import confinement, native
native.keep_needed_capabilities(starts_monitors=False)
native.confine(confinement.build_native(starts_monitors=False))
libc = ctypes.CDLL(None, use_errno=True)
def attempt(what):
    try:
        return what() or "done"
    except OSError as error:
        return error.strerror
print(attempt(os.fork))
print(attempt(lambda: os.execv("/bin/true", ["true"])))
print(attempt(lambda: socket.socket(socket.AF_INET)))
print(attempt(lambda: os.open(f"/proc/{os.getppid()}/mem", os.O_RDWR)))
print(attempt(lambda: os.kill(os.getppid(), 0)))
print(libc.ptrace(16, os.getppid(), 0, 0), os.strerror(ctypes.get_errno()))
print(attempt(lambda: os.stat(f"/proc/{os.getppid()}/ns/pid") and None))
"""


def test_put_on_a_process_it_holds() -> None:
    done = subprocess.run([sys.executable, "-c", _TRY], capture_output=True, text=True, check=True, timeout=SECONDS)
    refused = os.strerror(errno.ENOSYS)
    assert done.stdout.splitlines() == [*[refused] * 5, f"-1 {refused}", "done"]


_EXECUTE = """
import os
from mpu_notify.notify import native
native.keep_needed_capabilities(starts_monitors=True)
os.execv("/bin/cat", ["cat", "/proc/self/status"])
"""


@pytest.mark.parametrize("user", [0, 65534])
def test_a_monitor_that_is_started_later_has_its_capabilities(user: int) -> None:
    sets = "-all,+sys_ptrace,+dac_override"
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    begin = [*become, f"--inh-caps={sets}", f"--ambient-caps={sets}"] if user else []
    command = [*begin, "env", f"PYTHONPATH={installation.public_copy()}", installation.PYTHON, "-c", _EXECUTE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS, cwd="/")
    assert "CapEff:\t0000000000080002\n" in done.stdout
    assert "CapPrm:\t0000000000080002\n" in done.stdout
