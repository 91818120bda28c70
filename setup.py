"""Builds what pyproject.toml cannot say: the cffi extension and the C programs of csrc/."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import LinkError

CFLAGS = [
    "-std=c11",
    "-D_GNU_SOURCE",
    "-O2",
    "-g",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wconversion",
    "-Wsign-conversion",
    "-Wcast-qual",
    "-Wwrite-strings",
    "-Wformat=2",
    "-Wstrict-prototypes",
    "-Wmissing-prototypes",
    "-Wpointer-arith",
    "-Wundef",
    "-Wvla",
    "-Werror",
    "-fstack-protector-strong",
]
LDFLAGS = ["-Wl,-z,relro,-z,now"]
CSRC = Path("csrc")
# For the tests only (tests/sanitize): MPU_NOTIFY_SANITIZE says which of these.
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
SANITIZER = os.environ.get("MPU_NOTIFY_SANITIZE", "")
PROGRAMS = {
    "mpu-notify-monitor": [
        *("start.c", "monitor.c", "agent.c", "handover.c", "keeper.c"),
        *("listener.c", "slot.c", "call.c", "caller.c", "packet.c", "peer.c"),
    ],
    "mpu-notify-hook": ["hook.c", "inject.c"],
    "mpu-notify-runtime": ["runtime.c"],
}
# Without a dynamic loader, where there is a static C library, these start in half the time.
STARTED_OFTEN = {"mpu-notify-hook", "mpu-notify-runtime"}
# With musl in half of that again: it asks the processor nothing that a virtual machine has to answer.
STARTED_MOST = {"mpu-notify-runtime"}
MUSL = shutil.which("musl-gcc")

if SANITIZER:
    SANITIZE = [f"-fsanitize={SANITIZERS[SANITIZER]}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    CFLAGS += [*SANITIZE, f'-DREPORTS="{Path("reports").resolve()}"']
    LDFLAGS += SANITIZE
    STARTED_OFTEN.clear()  # a sanitizer needs the dynamic loader, and this C library
    STARTED_MOST.clear()
    for sources in PROGRAMS.values():
        sources.append("../tests/sanitize/options.c")
else:
    CFLAGS += ["-D_FORTIFY_SOURCE=2"]  # a sanitizer looks at these calls by itself


class BuildPrograms(build_ext):
    """build_ext, then each C program into mpu_notify/_bin (in the source tree where the install is editable)."""

    def run(self) -> None:
        """Build all of it."""
        super().run()
        package = Path("mpu_notify") if self.inplace or self.editable_mode else Path(self.build_lib, "mpu_notify")
        for name, sources in PROGRAMS.items():
            if name in STARTED_MOST and MUSL:
                self._build_with_musl(MUSL, name, sources, package / "_bin")
                continue
            objects = self.compiler.compile(
                [str(CSRC / source) for source in sources],
                output_dir=self.build_temp,
                extra_postargs=[*CFLAGS, "-fPIE"],
                depends=[str(header) for header in CSRC.glob("*.h")],
            )
            self._link(objects, name, package / "_bin")

    def _build_with_musl(self, compiler: str, name: str, sources: list[str], folder: Path) -> None:
        paths = [str(CSRC / source) for source in sources]
        folder.mkdir(parents=True, exist_ok=True)
        self.spawn([compiler, *CFLAGS, "-fPIE", "-static-pie", *paths, *LDFLAGS, "-o", str(folder / name)])

    def _link(self, objects: list[str], name: str, folder: Path) -> None:
        def link(flags: list[str]) -> None:
            self.compiler.link_executable(
                objects, name, output_dir=str(folder), libraries=["pthread"], extra_postargs=[*flags, *LDFLAGS]
            )

        if name not in STARTED_OFTEN:
            link(["-pie"])
            return
        try:
            link(["-static-pie"])
        except LinkError:  # a system without the static C library
            link(["-pie"])


setup(cffi_modules=["csrc/build_native.py:ffibuilder"], cmdclass={"build_ext": BuildPrograms})
