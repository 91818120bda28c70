"""cffi's description of mpu_notify.notify._native: the protocol's structs, and the few calls that Python lacks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import cffi

HERE = Path(__file__).parent

CALLS = """
#define CLONE_NEWNS ...
#define CLONE_NEWPID ...
#define CLONE_NEWUSER ...
#define MS_REC ...
#define MS_PRIVATE ...
#define MS_NOSUID ...
#define MS_NODEV ...
#define MS_NOEXEC ...
#define SECCOMP_FILTER_FLAG_SPEC_ALLOW ...
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV ...
#define MPU_IS_SANITIZED ...

int mpu_install_filter(const void *program, unsigned short instructions, unsigned long flags);
int mpu_filter_flags_known(unsigned long flags);
int mpu_no_new_privileges(void);
int mpu_unshare(int flags);
int mpu_mount(const char *source, const char *target, const char *type, unsigned long flags);
int mpu_die_with_parent(void);
bool mpu_is_dead(int pid);
bool mpu_has_monitor(int control);
int mpu_keep_needed_capabilities(bool starts_monitors);
int mpu_confine(const void *program, unsigned short instructions);
"""


def declarations(header: Path) -> str:
    """What cffi can read of a header: all but its guard and its includes."""
    lines = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL).splitlines()
    guard = re.compile(r"\s*#\s*(include|if|ifndef|endif|define \w+_H$)")
    return "\n".join(line for line in lines if not guard.match(line))


# For the tests (tests/sanitize). AddressSanitizer would have to be in Python itself, and in all that Python starts.
IS_SANITIZED = bool(os.environ.get("MPU_NOTIFY_SANITIZE"))
SANITIZE = ["-fsanitize=undefined", "-fno-sanitize-recover=all"] if IS_SANITIZED else []

ffibuilder = cffi.FFI()
ffibuilder.cdef(declarations(HERE / "protocol.h") + CALLS)
ffibuilder.set_source(
    "mpu_notify.notify._native",
    '#include <signal.h>\n#include "native.h"\n#include "protocol.h"\n',
    include_dirs=[str(HERE)],
    define_macros=[("MPU_IS_SANITIZED", str(int(IS_SANITIZED)))],
    extra_compile_args=["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wno-unused-parameter", *SANITIZE],
    extra_link_args=SANITIZE,
    depends=[str(header) for header in HERE.glob("*.h")],
    py_limited_api=True,
)
