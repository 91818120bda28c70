"""Every control in every layout, on a driver of every era, asked from every kind of place.

What is expected is written down here from what the processes of the scene are and do, by nothing that translates. With
one exception it does not depend on the era: a driver that counts by thread knows nobody for a thread that has ended.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from mpu_notify.notify.monitor import Monitor, identify
from mpu_notify.rm.client import RmClient
from mpu_notify.rm.eras import Era
from mpu_notify.standin.process import StandIn
from mpu_notify.supervisor.driver import Finding, How, Identity, Places, Watch
from mpu_notify.supervisor.service import Supervisor, monitored

from .crowd import Crowd, Member, Node, crowd
from .harness import SECONDS, eventually

MIB = 1 << 20
COMPUTE, GRAPHICS, SUBDEVICE, MPS = 0xCBC0, 0xCB97, 0x2080, 0x900E
NO_PROCESS = 0xFFFFFFFF
UTILISATION = (3, 50, 7)  # what the stand-in says of who uses an engine: fb, gr, nvenc
ENCODED = (1920, 1080, 30, 100)
THREAD_ERAS = (Era.THREAD_LIST, Era.THREAD_BOTH, Era.THREAD_ALL)
ABSENT = 3_999_999

#: From where is asked, and the process that does.
PLACES = {
    "host": "host asker",
    "container": "container init",
    "nested": "nested init",
    "sibling": "sibling init",
    "user namespace": "user init",
}
NODES = [
    Node("host asker"),
    Node("host user"),
    Node("host dead"),
    Node(
        "container init",
        "namespace",
        (
            Node("two clients"),
            Node("many threads"),
            Node("ended thread"),
            Node("dead"),
            Node("nested init", "namespace", (Node("nested user"),)),
        ),
    ),
    Node("sibling init", "namespace", (Node("sibling user"),)),
    Node("user init", "user", (Node("user user"),)),
]


class Client(NamedTuple):
    """A client that a process makes, and in which thread: "main", "another" that stays, or one that "ends"."""

    thread: str
    memory: int
    classes: str = "C"
    encodes: bool = False
    captures: bool = False

    @property
    def class_numbers(self) -> set[int]:
        return {SUBDEVICE, *({"C": COMPUTE, "G": GRAPHICS, "M": MPS}[letter] for letter in self.classes)}


#: In the order in which they are made, which is the order of the driver's lists.
CLIENTS: list[tuple[str, Client]] = [
    ("host user", Client("main", 100 * MIB, encodes=True)),
    ("two clients", Client("main", 10 * MIB)),
    ("sibling user", Client("another", 50 * MIB, "CG", encodes=True, captures=True)),
    ("many threads", Client("another", 40 * MIB, captures=True)),
    ("ended thread", Client("ends", 7 * MIB)),
    ("nested user", Client("main", 60 * MIB, encodes=True)),
    ("two clients", Client("main", 20 * MIB, "M", encodes=True)),
    ("many threads", Client("another", 3 * MIB, "CM")),
    ("many threads", Client("main", 5 * MIB, "G")),
    ("user user", Client("another", 80 * MIB, captures=True)),
    ("user user", Client("main", 0, "G")),
    ("host dead", Client("main", 1 * MIB)),
    ("dead", Client("main", 2 * MIB)),
]
DEAD = ("host dead", "dead")
RESERVES = "nested user"
#: Those that have a client to ask with; made last.
PREPARED = (*PLACES.values(), RESERVES)


@dataclass
class Scene:
    """The living processes before a driver of an era, all askers supervised."""

    era: Era
    crowd: Crowd
    gpu_id: int

    def asker(self, place: str) -> Member:
        return self.crowd[PLACES[place]]

    def visible(self, place: str) -> dict[str, int]:
        """The living processes that are in the asker's namespace or below it, with their numbers there."""
        namespace = self.asker(place).namespaces[-1]
        living = (member for name, member in self.crowd.members.items() if name not in DEAD)
        return {member.name: member.pids[namespace] for member in living if namespace in member.pids}

    def holders(self, place: str, class_number: int, *, forgetful: Sequence[Era]) -> list[int]:
        """The numbers of those that hold an object of a class, by a thread that is there where the era wants that."""
        found = [
            name for name, client in CLIENTS if class_number in client.class_numbers and self.knows(client, forgetful)
        ]
        if class_number == SUBDEVICE:
            found += PREPARED
        visible = self.visible(place)
        return list(dict.fromkeys(visible[name] for name in found if name in visible))

    def knows(self, client: Client, forgetful: Sequence[Era]) -> bool:
        return client.thread != "ends" or self.era not in forgetful

    def memory(self, place: str, pid: int) -> int:
        """What a process has, as far as a driver of the era can tell."""
        names = [name for name, number in self.visible(place).items() if number == pid]
        return sum(
            client.memory
            for name, client in CLIENTS
            if name in names and self.knows(client, (Era.THREAD_BOTH, Era.THREAD_ALL))
        )


class Mode(NamedTuple):
    era: Era
    known: bool  # to the supervisor
    translate: str


MODES = [
    *(Mode(era, known=True, translate="auto") for era in Era),
    *(Mode(era, known=False, translate="auto") for era in Era),
    Mode(Era.NATIVE, known=True, translate="always"),
]


def mode_id(mode: Mode) -> str:
    return f"{mode.era.value}-{mode.translate if mode.known else 'unknown'}"


@pytest.fixture(scope="module", params=MODES, ids=mode_id)
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    mode: Mode = request.param
    with StandIn("--era", mode.era.value) as driver:
        device = identify(driver.control_node)
        nowhere = Places(Path("/nowhere"), Path("/nowhere"))
        finding = Finding(Identity(None, device), mode.era if mode.known else None, How.ASKED)
        watch = Watch(driver.control_node, mode.translate, finding, nowhere)
        with Monitor.start(device, map(monitored, watch.treatment.rows)) as monitor:
            supervisor = Supervisor(monitor, watch=watch)
            thread = threading.Thread(target=supervisor.serve_until_idle)
            with crowd(driver.control_node, NODES) as people:
                use_the_gpu(driver.control_node, people)
                for name in PLACES.values():
                    listener = people[name].listener()
                    supervisor.attach(name, listener)
                    os.close(listener)
                thread.start()
                gpu_ids = {people[name].say(do="prepare")["gpu_id"] for name in PREPARED}
                assert people[RESERVES].ask("profiler", 0x90CC0101, bytes(1))[0] == 0
                yield Scene(mode.era, people, *gpu_ids)
            thread.join()
        assert monitor.process is not None
        assert monitor.process.wait(SECONDS) == 0


def use_the_gpu(node: Path, people: Crowd) -> None:
    for name, client in CLIENTS:
        people[name].say(do="use", **client._asdict())
    for name in DEAD:
        people[name].end()
        people[name].await_end()
    with RmClient(node) as client:
        (gpu,) = client.gpus()
        gone = {people[name].host_pid for name in DEAD}
        eventually(lambda: not gone & set(gpu.pids(COMPUTE)), "the driver knows that they are gone")


pytestmark = pytest.mark.timeout(300)
every_place = pytest.mark.parametrize("place", PLACES)


# -------------------------------------------------------------------------------- the processes of a GPU


@every_place
@pytest.mark.parametrize("class_number", [SUBDEVICE, COMPUTE, GRAPHICS, MPS], ids=hex)
def test_who_holds_a_class(scene: Scene, place: str, class_number: int) -> None:
    asked = struct.pack("<II", 0, class_number)
    status, params, _ = scene.asker(place).ask("subdevice", 0x2080018D, asked.ljust(3812, b"\xee"))
    assert status == 0
    assert params[:8] == asked
    (count,) = struct.unpack_from("<I", params, 8)
    pids = struct.unpack_from(f"<{count}I", params, 12)
    assert sorted(pids) == sorted(scene.holders(place, class_number, forgetful=THREAD_ERAS))
    assert not any(params[12 + 4 * count :]), "nothing stale behind the list"


@every_place
@pytest.mark.parametrize(
    ("size", "stride", "counters", "has_instance"), [(14408, 72, 6, True), (9608, 48, 3, True), (8008, 40, 3, False)]
)
def test_how_much_memory_a_process_has(  # noqa: PLR0913 - a layout
    scene: Scene, place: str, size: int, stride: int, counters: int, *, has_instance: bool
) -> None:
    visible = set(scene.visible(place).values())
    foreign = {member.host_pid for member in scene.crowd.members.values()} - visible
    asked = [*visible, ABSENT, 0, *foreign, *visible]
    entries = b"".join(struct.pack("<II", pid, 0).ljust(stride, b"\xee") for pid in asked)
    params = struct.pack("<II", len(asked), 0) + entries
    status, params, _ = scene.asker(place).ask("subdevice", 0x2080018E, params.ljust(size, b"\xee"))
    assert status == 0
    assert struct.unpack_from("<I", params) == (len(asked),)
    for index, pid in enumerate(asked):
        entry = params[8 + stride * index : 8 + stride * (index + 1)]
        result = 0x1F if pid == 0 else 0
        assert struct.unpack_from("<III", entry) == (pid, 0, result)
        memory = struct.pack(f"<{counters}Q", scene.memory(place, pid), *[0] * (counters - 1))
        assert entry[16:] == memory + (b"\xff" * 8 if has_instance else b""), pid


# -------------------------------------------------------------------------------- utilisation


@every_place
@pytest.mark.parametrize(
    ("size", "capacity", "engine_size", "engines"),
    [(47216, 100, 116, 4), (34000, 72, 116, 4), (50704, 72, 116, 6), (55888, 72, 128, 6)],
)
def test_who_made_the_gpu_busy(  # noqa: PLR0913, PLR0917 - a layout
    scene: Scene, place: str, size: int, capacity: int, engine_size: int, engines: int
) -> None:
    stride = 8 + engines * engine_size
    head = struct.pack("<4I", 2, capacity * stride, 0, 0)
    status, params, _ = scene.asker(place).ask("subdevice", 0x20802096, head.ljust(size, b"\xee"))
    assert status == 0
    assert params[:8] == head[:8]
    busy = [name for number in (COMPUTE, GRAPHICS) for name, client in CLIENTS if number in client.class_numbers]
    users = [name for name in dict.fromkeys(busy) if name not in DEAD]
    samples = [None] * (capacity - len(users)) + users
    encoders = {name for name, client in CLIENTS if client.encodes}
    for index, name in enumerate(samples):
        sample = params[16 + stride * index : 16 + stride * (index + 1)]
        assert struct.unpack_from("<Q", sample) != (0,)
        for number in range(engines):
            engine = sample[8 + engine_size * number :][:engine_size]
            uses = name is not None and (number < 2 or (number == 2 and name in encoders))
            assert engine == expected_engine(scene, place, number, name if uses else None, engine_size)


def expected_engine(scene: Scene, place: str, engine: int, user: str | None, size: int) -> bytes:
    """No process: as the driver fills it in. One that is not visible: nothing at all."""
    pids = scene.visible(place)
    if user is None:
        return struct.pack("<4I", 0, 1, NO_PROCESS, 0).ljust(size, b"\0")
    threads = {client.thread for name, client in CLIENTS if name == user}
    if user not in pids or (threads == {"ends"} and scene.era is Era.THREAD_ALL):
        return struct.pack("<4I", 0, 0, NO_PROCESS, 0).ljust(size, b"\0")
    return struct.pack("<4I", UTILISATION[engine], 1, pids[user], 0).ljust(size, b"\0")


# -------------------------------------------------------------------------------- accounting


def accounted(scene: Scene, place: str, *, forgetful: Sequence[Era]) -> set[int]:
    contexts = (scene.holders(place, number, forgetful=forgetful) for number in (COMPUTE, GRAPHICS))
    return {pid for pids in contexts for pid in pids}


@every_place
def test_who_is_accounted(scene: Scene, place: str) -> None:
    head = struct.pack("<II", scene.gpu_id, 0)
    status, params, _ = scene.asker(place).ask("root", 0xB04, head.ljust(16012, b"\xee"))
    assert status == 0
    assert params[:8] == head
    (count,) = struct.unpack_from("<I", params, 16008)
    pids = struct.unpack_from(f"<{count}I", params, 8)
    assert sorted(pids) == sorted(accounted(scene, place, forgetful=(Era.THREAD_ALL,))), "and no dead process"
    assert not any(params[8 + 4 * count : 16008])


@every_place
def test_what_is_accounted(scene: Scene, place: str) -> None:
    for pid in accounted(scene, place, forgetful=()):
        status, params, _ = scene.asker(place).ask(
            "root", 0xB03, struct.pack("<II", scene.gpu_id, pid).ljust(48, b"\0")
        )
        assert status == 0
        assert struct.unpack_from("<6IQ", params)[:5] == (scene.gpu_id, pid, 0, UTILISATION[1], UTILISATION[0])
        names = [name for name, number in scene.visible(place).items() if number == pid]
        total = sum(client.memory for name, client in CLIENTS if name in names)
        assert struct.unpack_from("<Q", params, 24) == (total,)


# -------------------------------------------------------------------------------- sessions and reservations


def encoders(scene: Scene, place: str) -> list[int]:
    visible = scene.visible(place)
    return [visible[name] for name, client in CLIENTS if client.encodes and name in visible]


def check_encoders(scene: Scene, place: str, count: int, table: bytes) -> None:
    expected = encoders(scene, place)
    assert count == len(expected)
    rows = [struct.unpack_from("<8I", table, 32 * index) for index in range(count)]
    assert [row[:2] + row[3:] for row in rows] == [(pid, 0, 0, *ENCODED) for pid in expected]
    assert len({row[2] for row in rows}) == count, "each with its own session"
    assert not any(table[32 * count :])


@every_place
def test_who_encodes(scene: Scene, place: str) -> None:
    stale = b"\xee" * (32 * 512)
    status, params, table = scene.asker(place).ask("subdevice", 0x2080016E, struct.pack("<I12x", 512), (8, stale))
    assert status == 0
    check_encoders(scene, place, struct.unpack_from("<I", params)[0], table)


@every_place
def test_how_many_encode(scene: Scene, place: str) -> None:
    status, params, _ = scene.asker(place).ask("subdevice", 0x2080016E, bytes(16))
    assert (status, params) == (0, struct.pack("<I12x", len(encoders(scene, place))))


@every_place
@pytest.mark.parametrize("cmd", [0x208001A9, 0x208001AF], ids=hex)
def test_who_encodes_in_the_second_version(scene: Scene, place: str, cmd: int) -> None:
    status, params, _ = scene.asker(place).ask("subdevice", cmd, struct.pack("<I", 512).ljust(16388, b"\xee"))
    assert status == 0
    check_encoders(scene, place, struct.unpack_from("<I", params)[0], params[4:])


@every_place
def test_who_captures(scene: Scene, place: str) -> None:
    status, params, _ = scene.asker(place).ask("subdevice", 0x2080017C, b"\xee" * 13316)
    assert status == 0
    visible = scene.visible(place)
    expected = [visible[name] for name, client in CLIENTS if client.captures and name in visible]
    (count,) = struct.unpack_from("<I", params)
    rows = [struct.unpack_from("<13I", params, 4 + 52 * index) for index in range(count)]
    assert [row[:3] + row[4:] for row in rows] == [(pid, 0, 0, 1, 0, 0, *ENCODED[:2], *ENCODED) for pid in expected]
    assert not any(params[4 + 52 * count :])


@every_place
def test_who_reserved_the_performance_counters(scene: Scene, place: str) -> None:
    status, params, _ = scene.asker(place).ask("profiler", 0x90CC0103, b"\xee" * 12)
    assert status == 0
    assert struct.unpack("<III", params) == (1, scene.visible(place).get(RESERVES, 0), 0), "0: of nobody who is visible"
