"""Building the fuzz targets with clang's libFuzzer, AddressSanitizer and UBSan, and running them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
BUILD = HERE.parent.parent / "build" / "fuzz"
#: The inputs that are kept: one folder a target. Those with a name were written by hand, and say what they are for.
CORPUS = HERE / "corpus"
TARGETS = sorted(source.stem for source in HERE.glob("*.c"))

MAX_INPUT = 8192  # bytes
GRACE_SECONDS = 60

# The archive holds what a target needs beside the file that it includes; programs' main is none to the linker.
_SANITIZE = ["-fsanitize=fuzzer-no-link,address,undefined", "-fno-sanitize-recover=all"]
_CFLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer"]
# A large quarantine makes the hook's large buffers slow.
_ENVIRONMENT = {"ASAN_OPTIONS": "quarantine_size_mb=16", "UBSAN_OPTIONS": "print_stacktrace=1"}


class FuzzError(Exception):
    """A target failed; the text says on what, and how to see it again."""


def _compile(source: Path, made: Path, *options: str) -> Path:
    includes = [f"-I{HERE}", f"-I{CSRC}"]
    subprocess.run(["clang", *_CFLAGS, *_SANITIZE, *includes, "-o", made, source, *options], check=True)
    return made


def _compile_archive() -> Path:
    objects = BUILD / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    archive = BUILD / "csrc.a"
    archive.unlink(missing_ok=True)

    def compile_one(source: Path) -> Path:
        return _compile(source, objects / f"{source.stem}.o", "-c", "-Dmain=program_main")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(compile_one, CSRC.glob("*.c")))
    subprocess.run(["ar", "rcs", archive, *made], check=True)
    return archive


def build(targets: Sequence[str]) -> None:
    """Compile targets, from what csrc/ is now."""
    archive = _compile_archive()

    def compile_one(target: str) -> Path:
        return _compile(HERE / f"{target}.c", BUILD / target, str(archive), "-fsanitize=fuzzer", "-lpthread")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, targets))


def fuzz(target: str, seconds: int) -> str:
    """Run a target from its kept inputs; what libFuzzer says last. New inputs go to build/fuzz. Raises FuzzError."""
    found = BUILD / "found" / target
    options = [f"-max_total_time={seconds}", "-seed=1", f"-max_len={MAX_INPUT}", "-timeout=10", "-close_fd_mask=3"]
    return _run(target, seconds, [f"-artifact_prefix={_failures(target)}", *options, found, CORPUS / target])


def keep(target: str) -> None:
    """Make the kept inputs the fewest that reach what they and those found reach. Raises FuzzError."""
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        merged = Path(folder, "merged")
        options = ["-merge=1", "-use_counters=0", f"-max_len={MAX_INPUT}", "-close_fd_mask=3"]
        _run(target, GRACE_SECONDS, [*options, merged, CORPUS / target, BUILD / "found" / target])
        by_hand = {file.name: file.read_bytes() for file in (CORPUS / target).iterdir() if "-" in file.name}
        found = {file.name[:16]: file.read_bytes() for file in merged.iterdir()}
        shutil.rmtree(CORPUS / target)
        (CORPUS / target).mkdir()
        for name, content in found.items():
            if content not in by_hand.values():
                (CORPUS / target / name).write_bytes(content)
        for name, content in by_hand.items():
            (CORPUS / target / name).write_bytes(content)


def fuzz_all(targets: Sequence[str], seconds: int) -> dict[str, str | FuzzError]:
    """Fuzz several targets for so long each, as many at a time as there are processors; what came of each."""

    def outcome(target: str) -> str | FuzzError:
        try:
            return fuzz(target, seconds)
        except FuzzError as error:
            return error

    build(targets)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(targets, pool.map(outcome, targets), strict=True))


def _failures(target: str) -> str:
    return f"{BUILD}/failed-{target}-"


def _run(target: str, seconds: int, options: Sequence[str | Path]) -> str:
    for folder in (each for each in options if isinstance(each, Path)):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as work:
        try:
            done = subprocess.run(
                [BUILD / target, *options],
                cwd=work,
                env={**os.environ, **_ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=seconds + GRACE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise FuzzError(f"{target} did not end: {error}") from error
    if done.returncode:
        failed = sorted(Path(BUILD).glob(f"failed-{target}-*"), key=lambda file: file.stat().st_mtime)
        again = shlex.join([str(BUILD / target), *map(str, failed[-1:])])
        raise FuzzError(
            f"{done.stdout}\n{target} failed with status {done.returncode}. Again: (cd $(mktemp -d) && {again})"
        )
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else ""
