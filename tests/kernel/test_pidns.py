"""Both PID views against real trees of namespaces, whose ids are known from the trees themselves."""

import ctypes
import gc
import os
import resource
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpu_notify import pidns
from mpu_notify.pidns import NamespaceIoctlView, NSpidView, PidView
from mpu_notify.pidns.views import namespace_ioctls_work

from .pidtree import CLONE_NEWPID, Node, Tree, clone, end, setns_pid, sleeper

TICK_NS = 10_000_000
PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
PR_SET_DUMPABLE = 4
NOBODY = 65534

Kind = type[NSpidView] | type[NamespaceIoctlView]
KINDS: list[Kind] = [NSpidView, NamespaceIoctlView] if namespace_ioctls_work() else [NSpidView]
both = pytest.mark.parametrize("kind", KINDS)

flags = st.booleans()
leaves = st.builds(
    Node,
    kind=st.sampled_from(["process", "process", "namespace", "user"]),
    threads=st.integers(0, 2),
    reaps=flags,
    dies=flags,
    children=st.just(()),
)
trees = st.recursive(
    leaves,
    lambda inner: st.builds(
        # Only leaves and first processes of namespaces die: what becomes of the others is known then.
        lambda kind, reaps, dies, children: Node(
            kind, 0, reaps, dies=dies and kind != "process", children=tuple(children)
        ),
        st.sampled_from(["process", "namespace", "namespace", "user"]),
        flags,
        flags,
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=6,
)


def view_of(kind: Kind, tid: int) -> PidView:
    return kind(os.open(f"/proc/{tid}/ns/pid", os.O_RDONLY))


def descriptors() -> int:
    gc.collect()  # or what earlier tests dropped is closed between two counts
    return len(list(Path("/proc/self/fd").iterdir()))


def boottime() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@given(children=st.lists(trees, min_size=1, max_size=3), reaps=flags)
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_random_trees(children: list[Node], reaps: bool) -> None:  # noqa: FBT001 - hypothesis
    before = descriptors()
    with Tree(Node(reaps=reaps, children=tuple(children))) as tree, ExitStack() as stack:
        namespaces = sorted({namespace for namespace, _ in tree.pids})
        # The tree's two accounts of itself agree: what the namespace's first process sees, and getpid().
        assert tree.own_pid == {p.number: tree.pids[p.namespaces[-1], p.number] for p in tree.plans}
        views = {
            (namespace, kind): stack.enter_context(view_of(kind, tree.pids[0, namespace]))
            for namespace in namespaces
            for kind in KINDS
        }
        check_all(tree, views, {p.number: "alive" for p in tree.plans})
        check_threads(tree, views)
        check_all(tree, views, tree.kill())
    assert descriptors() == before


Views = dict[tuple[int, Kind], PidView]


def check_all(tree: Tree, views: Views, states: dict[int, str]) -> None:
    """Every process in every namespace, and every number of one namespace in every other."""
    nodes = [p.number for p in tree.plans]
    hosts = [tree.pids[0, node] for node in nodes]
    numbers = sorted(set(tree.pids.values()))
    for (namespace, _), view in views.items():
        known = [node for node in nodes if states[node] != "gone"]
        pids = [tree.pids.get((namespace, node)) if node in known else None for node in nodes]
        assert view.to_views(hosts) == pids
        assert [view.to_view(host) for host in hosts] == pids
        if namespace != 0:  # the host's has other processes too, with numbers of ours
            back = {tree.pids[namespace, n]: tree.pids[0, n] for n in known if (namespace, n) in tree.pids}
            assert view.to_hosts(numbers) == [back.get(number) for number in numbers]
        assert view.to_hosts(hosts) == view.to_hosts(hosts[::-1])[::-1]


def check_threads(tree: Tree, views: Views) -> None:
    for plan in tree.plans:
        host = tree.pids[0, plan.number]
        tids = [int(entry.name) for entry in Path(f"/proc/{host}/task").iterdir()]
        assert len(tids) == 1 + plan.node.threads
        for (namespace, _), view in views.items():
            assert view.to_views(tids) == [tree.pids.get((namespace, plan.number))] * len(tids)
            if namespace == plan.namespaces[-1]:
                assert view.to_hosts(tree.own_tids[plan.number]) == [None] * plan.node.threads


@both
def test_every_node_of_one_rich_tree(kind: Kind) -> None:
    """What the random trees may not draw together: zombies, reaped ones, an exited namespace of each fate."""
    inner = Node("namespace", threads=2, children=(Node(dies=True), Node(threads=1)))
    fates = [
        Node("namespace", reaps=True, children=(Node(dies=True), inner)),
        Node("user", children=(Node("user", dies=True, children=(Node(),)), Node())),
        Node("namespace", dies=True, children=(Node("namespace", children=(Node(),)),)),
    ]
    for reaps in (False, True):
        with Tree(Node(reaps=reaps, children=tuple(fates))) as tree, ExitStack() as stack:
            namespaces = {namespace for namespace, _ in tree.pids}
            views: Views = {(n, kind): stack.enter_context(view_of(kind, tree.pids[0, n])) for n in namespaces}
            states = tree.kill()
            assert set(states.values()) == {"alive", "zombie", "gone"}
            check_all(tree, views, states)


@both
@pytest.mark.parametrize("number", [0, -1, -(2**31), 2**31 - 1, 2**31, 2**32 - 1, 2**32 + 1, 2**64 + 1])
def test_impossible_ids(kind: Kind, number: int) -> None:
    with view_of(kind, os.getpid()) as view:
        assert view.to_view(number) is None
        assert view.to_host(number) is None
        # With an own process's number in the lower 32 bits, too.
        assert view.to_view(number * 2**32 + os.getpid()) == (None if number else os.getpid())
        assert view.to_host(number * 2**32 + os.getpid()) == (None if number else os.getpid())
        assert view.to_hosts([]) == view.to_views([]) == []


@both
def test_repeated_ids_in_one_batch(kind: Kind) -> None:
    with view_of(kind, os.getpid()) as view:
        assert view.to_hosts([os.getpid(), 0, os.getpid()]) == [os.getpid(), None, os.getpid()]
        assert view.to_views([os.getpid(), 0, os.getpid()]) == [os.getpid(), None, os.getpid()]


@both
def test_closed_view_answers_nothing(kind: Kind) -> None:
    before = descriptors()
    view = view_of(kind, os.getpid())
    view.close()
    view.close()
    assert descriptors() == before


def test_open_view() -> None:
    with Tree(Node(children=(Node("namespace", threads=1, children=(Node(),)),))) as tree:
        host = tree.pids[0, 1]
        (thread,) = {int(entry.name) for entry in Path(f"/proc/{host}/task").iterdir()} - {host}
        with pidns.open_view(thread) as view:
            assert isinstance(view, KINDS[-1])
            assert view.to_view(thread) == 1
            assert view.to_host(1) == host
            assert view.to_view(os.getpid()) is None


def test_open_view_of_a_task_that_is_gone() -> None:
    child = sleeper([])
    end(child)
    with pytest.raises(pidns.ProcessGone, match=f"/proc/{child}/ns/pid.*task {child}"):
        pidns.open_view(child)


@contextmanager
def reused_number() -> Iterator[tuple[int, int]]:
    """Yield a host id that passed to another process, and a time between the two."""
    pid = sleeper([])
    end(pid)
    between = boottime()
    time.sleep(2 * TICK_NS / 1e9)
    assert sleeper([pid]) == pid
    try:
        yield pid, between
    finally:
        end(pid)


@both
def test_started_by_tells_a_reused_number(kind: Kind) -> None:
    with reused_number() as (pid, between), view_of(kind, os.getpid()) as view:
        assert view.to_view(pid) == pid
        assert not view.started_by(pid, between)
        assert view.started_by(pid, boottime())
    assert not pidns.started_by(pid, boottime())


def test_the_same_tick_counts_as_started() -> None:
    for _ in range(20):
        before = boottime()
        child = sleeper([])
        after = boottime()
        started = pidns.started_by(child, before)
        assert pidns.started_by(child, after)
        end(child)
        if before // TICK_NS == after // TICK_NS:
            assert started
            return
    pytest.fail("never forked within one tick")


def test_started_by_of_threads() -> None:
    between = boottime()
    time.sleep(2 * TICK_NS / 1e9)
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    assert thread.native_id
    assert pidns.started_by(os.getpid(), between)
    assert not pidns.started_by(thread.native_id, between)
    assert pidns.started_by(thread.native_id, boottime())
    go.set()
    thread.join()


@both
def test_a_number_that_moves_between_namespaces_is_never_mistaken(
    kind: Kind,
) -> None:
    """One host id belongs in turn to a process of either of two siblings, with different ids there."""
    with Tree(Node(children=(Node("namespace"), Node("namespace")))) as tree:
        spare = sleeper([])
        end(spare)
        mover = os.fork()
        if mover == 0:
            _move(spare, [(tree.pids[0, 1], 1001), (tree.pids[0, 2], 1002)])
        try:
            with view_of(kind, tree.pids[0, 1]) as one, view_of(kind, tree.pids[0, 2]) as two:
                seen: Counter[tuple[int | None, int | None]] = Counter()
                back = set()
                deadline = time.monotonic() + 20
                while min(seen[1001, None], seen[None, 1002]) < 100 and time.monotonic() < deadline:
                    for _ in range(100):
                        seen[one.to_view(spare), two.to_view(spare)] += 1
                    back.add((one.to_host(1001), one.to_host(1002)))
        finally:
            end(mover)
    assert {answer for answer, _ in seen} == {None, 1001}
    assert {answer for _, answer in seen} == {None, 1002}
    assert back <= {(None, None), (spare, None)}


@both
def test_thread_of_a_process_whose_first_thread_has_exited(
    kind: Kind,
) -> None:
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        threading.Thread(target=signal.pause).start()
        ctypes.CDLL(None).pthread_exit(None)
    try:
        deadline = time.monotonic() + 20
        while b"\nState:\tZ" not in Path(f"/proc/{child}/status").read_bytes():
            assert time.monotonic() < deadline
        (thread,) = {int(entry.name) for entry in Path(f"/proc/{child}/task").iterdir()} - {child}
        with view_of(kind, thread) as view:
            assert view.to_views([child, thread]) == [child, child]
            assert view.to_hosts([child, thread]) == [child, None]
    finally:
        end(child)


def _move(host: int, places: list[tuple[int, int]]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    try:
        namespaces = [(os.open(f"/proc/{init}/ns/pid", os.O_RDONLY), pid) for init, pid in places]
        while True:
            for nsfd, pid in namespaces:
                setns_pid(nsfd)
                end(sleeper([pid, host]))
    finally:
        os._exit(1)


def in_child(body: Callable[[], None], flags: int = 0) -> None:
    """Run body in a process of its own, and fail as it fails."""
    reader, writer = os.pipe()
    child = clone(flags)
    if child == 0:
        try:
            body()
        except BaseException:  # noqa: BLE001 - goes to the parent
            os.write(writer, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:  # noqa: PTH123 - a pipe
        problem = file.read()
    os.waitpid(child, 0)
    assert not problem, problem


def test_unprivileged_it_serves_its_own_and_no_other() -> None:
    def body() -> None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, ctypes.c_ulong(1))
        init = 1
        with pytest.raises(pidns.NamespaceAccessDenied, match=r"/proc/1/ns/pid.*CAP_SYS_PTRACE"):
            pidns.open_view(init)
        with Tree(Node(children=(Node("user", threads=1, children=(Node(),)),))) as tree:
            for kind in KINDS:
                with view_of(kind, tree.pids[0, 1]) as view:
                    assert view.to_views([tree.pids[0, n] for n in range(3)]) == [None, 1, tree.pids[1, 2]]
                    assert view.to_hosts([1, tree.pids[1, 2]]) == [tree.pids[0, 1], tree.pids[0, 2]]
                    assert view.to_view(init) is None

    in_child(body)


def test_initial_namespace() -> None:
    assert pidns.in_initial_namespace()
    pidns.require_initial_namespace()


def test_not_the_initial_namespace() -> None:
    def body() -> None:
        assert not pidns.in_initial_namespace()
        own = Path("/proc/self/ns/pid").stat().st_ino
        with pytest.raises(pidns.NotInitialNamespace, match=rf"{own}.*4026531836.*--pid=host"):
            pidns.require_initial_namespace()

    in_child(body, CLONE_NEWPID)


def test_out_of_descriptors_is_an_error_and_not_an_answer() -> None:
    """Nobody may take "too many open files" for "not in the namespace"."""

    def body() -> None:
        with view_of(NSpidView, os.getpid()) as view:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            highest = max(int(fd.name) for fd in Path("/proc/self/fd").iterdir())
            while (lowest := os.dup(0)) < highest:
                pass  # no hole is left below
            os.close(lowest)
            for free in range(4):
                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, hard))
                if free < 2:
                    with pytest.raises(OSError, match="Too many open files"):
                        view.to_view(os.getpid())
                else:
                    assert view.to_view(os.getpid()) == os.getpid()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            again = os.dup(0)
            assert again == lowest  # whatever was opened is closed

    in_child(body)
