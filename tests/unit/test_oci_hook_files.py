"""What oci-hook/ offers to engines says what the engines and our programs expect."""

import json
import re
from pathlib import Path
from typing import Any

import mpu_notify
from mpu_notify.oci.engines.plan import RUNTIME

HOOKS = Path(__file__).parents[2] / "oci-hook"
ANNOTATION = "io.mpu-notify.enable"


def load(path: str) -> Any:
    return json.loads((HOOKS / path).read_text())


def check_hook(path: str, program: str, args: list[str], stage: str) -> None:
    """The hooks.d format, version 1.0.0: no other keys, patterns that match the whole key and value."""
    file = load(path)
    assert set(file) == {"version", "hook", "when", "stages"}
    assert file["version"] == "1.0.0"
    assert file["hook"] == {"path": program, "args": args}
    assert file["stages"] == [stage]
    assert set(file["when"]) == {"annotations"}
    ((key, value),) = file["when"]["annotations"].items()
    assert re.search(key, ANNOTATION)
    assert re.search(value, "true")
    for wrong in ("io-mpu-notify-enable", f"x{ANNOTATION}", f"{ANNOTATION}d"):
        assert not re.search(key, wrong)
    for wrong in ("untrue", "true ", "false", ""):
        assert not re.search(value, wrong)


def test_hooks_d() -> None:
    check_hook("hooks.d/99-mpu-notify.json", "@PACKAGE@/_bin/mpu-notify-hook", ["mpu-notify-hook"], "createRuntime")
    python = ["python3", "-I", "-S", "@PACKAGE@/oci/precreate.py"]
    check_hook("podman/99-mpu-notify-precreate.json", "/usr/bin/python3", python, "precreate")


def test_the_programs_are_in_the_package() -> None:
    package = Path(mpu_notify.__file__).parent
    for file in HOOKS.rglob("*.json"):
        for name in re.findall(r"@PACKAGE@/([^\"]+)", file.read_text()):
            assert (package / name).is_file()


def test_a_directory_that_crio_reads_has_no_stage_of_podmans_own() -> None:
    for file in (HOOKS / "hooks.d").iterdir():
        assert load(f"hooks.d/{file.name}")["stages"] == ["createRuntime"]


def test_cdi() -> None:
    spec = load("cdi/mpu-notify.json")
    assert re.fullmatch(r"\d+\.\d+\.\d+", spec["cdiVersion"])
    assert re.fullmatch(r"[A-Za-z][\w.-]*[A-Za-z0-9]/[A-Za-z][\w-]*[A-Za-z0-9]", spec["kind"])
    (device,) = spec["devices"]
    (hook,) = device["containerEdits"]["hooks"]
    # Asking for the device is the opt-in: the container has no annotation.
    assert hook == {
        "hookName": "createRuntime",
        "path": "@PACKAGE@/_bin/mpu-notify-hook",
        "args": ["mpu-notify-hook", "--always"],
    }


def test_runtime_class() -> None:
    lines = (HOOKS / "runtimeclass.yaml").read_text().splitlines()
    assert "kind: RuntimeClass" in lines
    assert f"handler: {RUNTIME}" in lines
    assert f"  name: {RUNTIME}" in lines


def test_the_page_names_every_file_and_device() -> None:
    page = (HOOKS / "README.md").read_text()
    for file in HOOKS.rglob("*"):
        if file.is_file() and file.name != "README.md":
            assert str(file.relative_to(HOOKS)) in page
    spec = load("cdi/mpu-notify.json")
    assert f"{spec['kind']}={spec['devices'][0]['name']}" in page
    assert len(page.splitlines()) < 120
