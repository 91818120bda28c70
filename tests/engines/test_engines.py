"""What holds for every engine with our runtime: a container that opted in sees its own processes, and no other does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from .asking import Answer
from .conftest import ENGINES, Stage
from .engines import Container, Engine, Wish
from .place import CommandError, eventually

_MANY = 50

_SAME_DOCKER = dict.fromkeys(
    ("docker-20-remapped", "docker-26-remapped"),
    "all that differs from the Docker without -remapped is the user namespace, which has a row of its own",
)
_WITHOUT_ENGINE = ("runc", "crun")

#: Row -> engine -> why there is no such cell. All others are run.
NO_CELL: dict[str, dict[str, str]] = {
    "user namespace": {
        "docker-20": "Docker has them for a whole daemon: docker-20-remapped",
        "docker-26": "Docker has them for a whole daemon: docker-26-remapped",
        "cri-1.6": "containerd has them over the CRI from 1.7 on",
    },
    "privileged": {
        **_SAME_DOCKER,
        **dict.fromkeys(_WITHOUT_ENGINE, "a word of engines; what a runtime gets of it is `unconfined`"),
    },
    "init": {
        **_SAME_DOCKER,
        **dict.fromkeys(("containerd-1.6", "containerd-1.7"), "ctr has no --init"),
        **dict.fromkeys(("cri-1.6", "cri-1.7"), "the CRI has no init; a pod's shared namespace is `container's PIDs`"),
        **dict.fromkeys(_WITHOUT_ENGINE, "a word of engines; a runtime starts what it is told"),
    },
    "all others": _SAME_DOCKER,
}


def every_engine(row: str = "all others") -> pytest.MarkDecorator:
    """The engines that have this row."""
    assert NO_CELL[row].keys() <= set(ENGINES), f"no such engine: {NO_CELL[row].keys()}"
    return pytest.mark.parametrize("engine", [each for each in ENGINES if each not in NO_CELL[row]], indirect=True)


def _sees_its_own(stage: Stage, engine: Engine, wish: Wish | None = None) -> Container:
    """The one process of a container, and a further one, are told of themselves and of no others."""
    asking = stage.out.start(engine, wish)
    first = asking.next()
    assert first.pids == {first.pid}
    exec_answer = asking.exec()
    assert exec_answer.pids == {first.pid, exec_answer.pid}
    return asking.container


@every_engine()
def test_a_container_that_opted_in_sees_its_own_processes_and_exec_does_too(stage: Stage, engine: Engine) -> None:
    _sees_its_own(stage, engine)


@every_engine()
def test_a_container_that_did_not_opt_in_is_left_alone(stage: Stage, engine: Engine) -> None:
    with engine.recording() as recorder:
        asking = stage.out.start(engine, Wish(opted_in=False))
        # The stand-in names processes as the host numbers them.
        assert asking.container.host_pid in asking.next().pids
        assert asking.container.host_pid in asking.exec().pids
        before, after = recorder.spec(asking.container.identifier)
        assert after == before


@every_engine()
def test_two_containers_at_once_see_only_their_own(stage: Stage, engine: Engine) -> None:
    one, other = stage.out.start(engine), stage.out.start(engine)
    for asking in one, other, one:
        first, further = asking.next(), asking.exec()
        assert first.pids == {1}
        assert further.pids == {1, further.pid}


@every_engine("user namespace")
def test_in_a_user_namespace(stage: Stage, engine: Engine) -> None:
    container = _sees_its_own(stage, engine, Wish(user_namespace=True))
    assert container.exec("/bin/busybox", "cat", "/proc/self/uid_map").split()[:2] != ["0", "0"]


@every_engine()
@pytest.mark.parametrize(
    "wish",
    [
        Wish(user=True),
        Wish(no_new_privileges=True),
        Wish(user=True, no_new_privileges=True),
        Wish(unconfined=True),
        Wish(read_only=True),
    ],
    ids=["user", "no-new-privileges", "user-no-new-privileges", "unconfined", "read-only"],
)
def test_as_another_user_restricted_or_not(stage: Stage, engine: Engine, wish: Wish) -> None:
    _sees_its_own(stage, engine, wish)


@every_engine("privileged")
def test_privileged_where_the_machine_can(stage: Stage, engine: Engine) -> None:
    try:
        stage.out.start(engine, Wish(privileged=True, stock=True))
    except CommandError:
        # Not on this machine: then with our runtime it is no different.
        with pytest.raises(CommandError):
            stage.out.start(engine, Wish(privileged=True))
    else:
        _sees_its_own(stage, engine, Wish(privileged=True))


@every_engine("init")
def test_with_an_init(stage: Stage, engine: Engine) -> None:
    asking = stage.out.start(engine, Wish(init=True))
    assert asking.next().pid > 1
    _sees_its_own(stage, engine, Wish(init=True))


@every_engine()
def test_in_the_pid_namespace_of_another_container(stage: Stage, engine: Engine) -> None:
    host = stage.out.start(engine)
    guest = stage.out.start(engine, Wish(pid_namespace_of=host.container))
    answer = guest.next()
    assert answer.pid != 1
    assert answer.pids == {1, answer.pid} == host.next().pids
    further = guest.exec()
    assert further.pids == {1, answer.pid, further.pid}


@every_engine()
def test_fifty_containers_at_once(stage: Stage, engine: Engine) -> None:
    with ThreadPoolExecutor(4) as pool:
        containers = list(pool.map(lambda _: stage.out.start(engine, every_ms=1000), range(_MANY)))
    counts = [len(each.answers()) for each in containers]
    answers = [each.after(count) for each, count in zip(containers, counts, strict=True)]
    assert answers == [Answer(1, frozenset({1}))] * _MANY
    further = containers[-1].exec()
    assert further.pids == {1, further.pid}


@every_engine()
def test_a_restarted_container_is_served_again(stage: Stage, engine: Engine) -> None:
    asking = stage.out.start(engine)
    assert asking.next().pids == {1}
    again = asking.restart()
    assert again.next().pids == {1}
    further = again.exec()
    assert further.pids == {1, further.pid}


@every_engine()
def test_without_an_agent_a_container_starts_and_is_left_alone(stage: Stage, engine: Engine) -> None:
    with engine.recording() as recorder:
        asking = stage.out.start(engine, Wish(absent="start"))
        assert asking.container.host_pid in asking.next().pids
        before, after = recorder.spec(asking.container.identifier)
        assert after == before


@every_engine()
def test_without_an_agent_a_container_is_refused_where_that_is_wished(stage: Stage, engine: Engine) -> None:
    with pytest.raises(CommandError) as refused:
        stage.out.start(engine, Wish(absent="refuse"))
    assert str(engine.ours.absent_socket) in str(refused.value)
    assert "not found" not in str(refused.value)


@every_engine()
def test_containers_outlive_a_supervisor_and_are_served_by_the_next(
    stage: Stage, engine: Engine, request: pytest.FixtureRequest
) -> None:
    agent = stage.agent_of(request.node.callspec.params["engine"])
    asking = stage.out.start(engine)
    assert asking.next().pids == {1}
    agent.kill_supervisor()
    # No call fails, it is the driver's own answer that stands, and containers start.
    assert asking.container.host_pid in asking.next().pids
    meanwhile = stage.out.start(engine)
    assert meanwhile.container.host_pid in meanwhile.next().pids
    agent.restart_supervisor()
    eventually(lambda: asking.next().pids == {1} == meanwhile.next().pids, "both are served again")
    further = asking.exec()
    assert further.pids == {1, further.pid}
    _sees_its_own(stage, engine)
