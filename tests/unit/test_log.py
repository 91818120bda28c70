"""The log: one line a record, whatever is in it, and never an exception."""

import json
import logging
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpu_notify.observe.log import LineHandler, LogFileError, OncePer, configure, event

LOG = logging.getLogger("mpu_notify.test")
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    logger = logging.getLogger("mpu_notify")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:], logger.level, logger.propagate = before
    logger.setLevel(logger.level)


def handler() -> LineHandler:
    (only,) = logging.getLogger("mpu_notify").handlers
    assert isinstance(only, LineHandler)
    return only


def test_text(tmp_path: Path) -> None:
    configure("debug", "text", tmp_path / "log")
    event(LOG, logging.DEBUG, "call 100%", control="0x2080018d", pids=[7, 8], name="a b", error=None, ok=True)
    expected = rf'{TIME} debug call 100% control=0x2080018d pids=\[7,8\] name="a b" error=null ok=true\n'
    assert re.fullmatch(expected, (tmp_path / "log").read_text())


def test_json(tmp_path: Path) -> None:
    configure("info", "json", tmp_path / "log")
    event(LOG, logging.WARNING, "call", pids=[7, 8], file=Path("/a b"), level="mine")
    line = json.loads((tmp_path / "log").read_text())
    assert re.fullmatch(TIME, line.pop("time"))
    assert line == {"level": "warning", "message": "call", "pids": [7, 8], "file": "/a b", "level_": "mine"}


def test_level(tmp_path: Path) -> None:
    configure("warning", "text", tmp_path / "log")
    event(LOG, logging.INFO, "no")
    event(LOG, logging.WARNING, "yes")
    assert (tmp_path / "log").read_text().endswith(" warning yes\n")
    assert (tmp_path / "log").read_text().count("\n") == 1


@pytest.mark.parametrize("fmt", ["text", "json"])
@given(key=st.text(), value=st.text(), message=st.text())
def test_a_record_is_one_printable_line(
    fmt: str, key: str, value: str, message: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    configure("debug", "text" if fmt == "text" else "json", path)
    event(LOG, logging.INFO, message, **{key: value})
    assert re.fullmatch(rb"[ -~]+\n", path.read_bytes())
    assert handler().lost == 0


@given(value=st.text())
def test_a_text_value_can_be_read_back(value: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    configure("debug", "text", path)
    event(LOG, logging.INFO, "m", key=value)
    shown = path.read_text().partition(" key=")[2].removesuffix("\n")
    assert (json.loads(shown) if shown.startswith('"') else shown) == value


def test_an_exception_stays_on_its_line(tmp_path: Path) -> None:
    configure("debug", "text", tmp_path / "log")
    try:
        int("bad\nworse")
    except ValueError:
        LOG.exception("failed")
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.count("ValueError") == 1
    assert "Traceback" in line


def test_full_disk_is_counted_and_not_raised() -> None:
    configure("debug", "text", Path("/dev/full"))
    event(LOG, logging.ERROR, "one")
    event(LOG, logging.ERROR, "two")
    assert handler().lost == 2


def test_lost_lines_are_told_when_there_is_room_again(tmp_path: Path) -> None:
    """And a line of which only the beginning was written does not run into the next one."""
    configure("debug", "text", tmp_path / "log")
    event(LOG, logging.INFO, "first")
    size = (tmp_path / "log").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handled = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
    for _ in range(3):
        event(LOG, logging.INFO, "lost")
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handled)
    event(LOG, logging.INFO, "last")
    first, torn, told, last, *rest = (tmp_path / "log").read_text().splitlines()
    assert first.endswith(" info first")
    assert len(torn) == 10
    assert told.endswith(" warning lines before this one were lost lines=3")
    assert last.endswith(" info last")
    assert not rest


def test_a_record_that_cannot_be_formatted_is_counted(tmp_path: Path) -> None:
    configure("debug", "json", tmp_path / "log")
    event(LOG, logging.ERROR, "keys", mapping={(1, 2): 3})
    LOG.error("%d", "word")
    assert handler().lost == 2


def test_file_that_cannot_be_opened(tmp_path: Path) -> None:
    configure("debug", "text", tmp_path / "log")
    missing = tmp_path / "missing" / "log"
    with pytest.raises(LogFileError, match=rf"{missing}: No such file.*stderr"):
        configure("debug", "text", missing)
    event(LOG, logging.INFO, "still here")
    assert "still here" in (tmp_path / "log").read_text()


def test_unknown_level_and_format() -> None:
    with pytest.raises(ValueError, match="'loud': must be one of debug"):
        configure("loud", "text", None)
    with pytest.raises(ValueError, match="'xml': must be one of text, json"):
        configure("info", "xml", None)  # type: ignore[arg-type]


def test_configured_again_it_appends_and_closes_the_old_file(tmp_path: Path) -> None:
    log = tmp_path / "log"
    configure("debug", "text", log)
    before = len(list(Path("/proc/self/fd").iterdir()))
    event(LOG, logging.INFO, "first")
    log.rename(tmp_path / "old")
    configure("debug", "text", log)
    event(LOG, logging.INFO, "second")
    configure("debug", "text", log)
    event(LOG, logging.INFO, "third")
    assert [line.split()[-1] for line in log.read_text().splitlines()] == ["second", "third"]
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("redirect", ["", "2>&-"])
def test_stderr(redirect: str) -> None:
    program = (
        "import logging; from mpu_notify.observe.log import configure, event; "
        "configure('info', 'text', None); event(logging.getLogger('mpu_notify'), logging.INFO, 'hello')"
    )
    shell = ["/bin/sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, program]
    done = subprocess.run(shell, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.endswith("info hello\n") or redirect


def test_once_per_key() -> None:
    once = OncePer()
    assert [once.first(("a", 1)), once.first(("a", 1)), once.first(("b", 1))] == [True, False, True]


def test_once_per_is_bounded_and_keeps_what_recurs() -> None:
    once = OncePer(limit=3)
    for number in range(100):
        assert once.first("recurring") == (number == 0)
        assert once.first(number)
    assert once.first(0)
