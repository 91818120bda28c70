"""Our answers and the driver's own agree: on a real GPU, and the rehearsal of that on the stand-in driver."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.gpu import oracle
from tests.gpu.rows import DUPLICATES, Judgement, Verdict
from tests.gpu.scene import CONTROL_NODE


@pytest.mark.timeout(480)
@pytest.mark.skipif(not CONTROL_NODE.exists(), reason=f"no NVIDIA driver here: there is no {CONTROL_NODE}")
def test_no_unexplained_difference_on_the_gpu(tmp_path: Path) -> None:
    findings = oracle.examine(tmp_path / "results.md", tmp_path, stand_in=False)
    assert findings.good(), oracle.results_text(findings, real=True)


@pytest.mark.timeout(300)
def test_rehearsal_in_containers(tmp_path: Path) -> None:
    runtime = shutil.which("runc")
    assert runtime, "runc is not installed"
    findings = oracle.examine(tmp_path / "results.md", tmp_path, stand_in=True, runtime=Path(runtime))
    assert findings.good(), oracle.results_text(findings, real=False)
    counts = Counter(one.place for one in findings.comparisons)
    assert counts == dict.fromkeys(("A", "B", "nested in A", "A, by exec", "A, the next supervisor"), 6) | {
        "A, no supervisor": 1
    }
    # Without a supervisor nothing is translated, with the next one everything is.
    translated = {one.place: one.translated for one in findings.comparisons if one.tool.startswith("mpu-notify ps")}
    assert translated.pop("A, no supervisor") == 0
    assert all(translated.values())


@pytest.mark.timeout(300)
def test_rehearsal_on_the_stand_in(tmp_path: Path) -> None:
    findings = oracle.examine(tmp_path / "results.md", tmp_path, stand_in=True)
    assert findings.good(), oracle.results_text(findings, real=False)
    assert Counter(one.place for one in findings.comparisons) == {"A": 6, "B": 6, "nested in A": 6}
    listed = {(one.tool.split()[0], one.place): one.judgement for one in findings.comparisons}
    assert {listed["mpu-notify", place].verdict for place in ("A", "B", "nested in A")} == {Verdict.EQUAL}
    lists = [one for one in findings.comparisons if one.tool.startswith("raw GET_PIDS")]
    assert {one.judgement for one in lists if one.place == "A"} == {Judgement(Verdict.EXPLAINED, DUPLICATES)}
    assert {one.judgement.verdict for one in lists if one.place != "A"} == {Verdict.EQUAL}
    told = (tmp_path / "results.md").read_text()
    assert "a rehearsal" in told
    assert "A, both GPUs | 0, 1 | 240 MiB" in told
