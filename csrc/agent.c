/*
 * The OCI seccomp agent's socket: one connection brings one ContainerProcessState and its fds, and ends. Each is seen
 * to in a thread of its own, which then serves the listener: a slow one holds up nobody.
 */
#include "agent.h"

#include "cleanup.h"
#include "monitor.h"
#include "packet.h"
#include "peer.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define STATE_MAX (1024 * 1024) /* bytes; a container's annotations, which are in it, may have some 256 KiB */
#define STATE_MS 5000           /* for all of it to come */
#define STATE_FDS_MAX 16
#define ARRIVING_MAX 64
#define ARRIVAL_FILES 8 /* connection, listener, state, slot, and for calls under way */
#define THREAD_STACK_BYTES (128 * 1024)
#define READ_BYTES (16 * 1024)

/* How far a JSON object has come: not what it says, only where it ends. */
struct extent {
    unsigned depth;
    bool in_string;
    bool escaped;
    bool complete;
};

/* A connection and what it has brought so far. */
struct arrival {
    struct monitor *monitor;
    int connection;
    struct ucred peer;
    int listener; /* -1 until it came */
    int state;    /* memfd */
    size_t size;
    struct extent extent;
};

int thread_start(void *(*body)(void *), void *argument)
{
    pthread_attr_t attributes;
    pthread_t thread;
    int error;

    if (pthread_attr_init(&attributes))
        return -ENOMEM;
    pthread_attr_setstacksize(&attributes, THREAD_STACK_BYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    error = pthread_create(&thread, &attributes, body, argument);
    pthread_attr_destroy(&attributes);
    return -error;
}

bool is_listener(int fd)
{
    static const char wanted[] = "anon_inode:seccomp notify";
    char path[64], target[sizeof(wanted)];
    ssize_t length;

    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    length = readlink(path, target, sizeof(target));
    return length == (ssize_t)sizeof(wanted) - 1 && memcmp(target, wanted, sizeof(wanted) - 1) == 0;
}

/* The listener among the fds; every other one is closed. */
static void take_fds(struct arrival *arrival, struct msghdr *message)
{
    for (struct cmsghdr *at = CMSG_FIRSTHDR(message); at; at = CMSG_NXTHDR(message, at)) {
        size_t count = (at->cmsg_len - CMSG_LEN(0)) / sizeof(int);

        if (at->cmsg_level != SOL_SOCKET || at->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t i = 0; i < count; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(at) + i * sizeof(int), sizeof(int));
            if (arrival->listener < 0 && is_listener(fd))
                arrival->listener = fd;
            else
                close(fd);
        }
    }
}

static bool is_space(char byte)
{
    return byte == ' ' || byte == '\t' || byte == '\r' || byte == '\n';
}

/* -EBADMSG where it cannot be a JSON object any more. */
static int extend(struct extent *extent, char byte)
{
    if (extent->in_string) {
        extent->in_string = extent->escaped || byte != '"';
        extent->escaped = !extent->escaped && byte == '\\';
        return 0;
    }
    if (extent->complete || extent->depth == 0)
        if (!is_space(byte) && (extent->complete || byte != '{'))
            return -EBADMSG;
    if (byte == '"')
        extent->in_string = true;
    else if (byte == '{' || byte == '[')
        extent->depth++;
    else if (byte == '}' || byte == ']')
        extent->complete = --extent->depth == 0;
    return 0;
}

static int take_bytes(struct arrival *arrival, const char *bytes, size_t size)
{
    if (size > STATE_MAX - arrival->size)
        return -E2BIG;
    for (size_t i = 0; i < size; i++) {
        int error = extend(&arrival->extent, bytes[i]);

        if (error)
            return error;
    }
    arrival->size += size;
    return write(arrival->state, bytes, size) == (ssize_t)size ? 0 : -EIO;
}

/* One piece of what the connection brings; 1 where it is complete: some runtimes do not hang up for a while. */
static int read_piece(struct arrival *arrival, uint64_t deadline)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(STATE_FDS_MAX * sizeof(int))];
    char bytes[READ_BYTES];
    struct iovec room = {bytes, sizeof(bytes)};
    struct msghdr message = {
        .msg_iov = &room, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    struct pollfd polled = {.fd = arrival->connection, .events = POLLIN};
    ssize_t got;
    int error;

    if (poll(&polled, 1, ms_until(deadline)) == 0)
        return -ETIMEDOUT;
    got = recvmsg(arrival->connection, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (got < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    take_fds(arrival, &message);
    if (got == 0)
        return 1;
    error = take_bytes(arrival, bytes, (size_t)got);
    return error ? error : arrival->extent.complete;
}

static int read_state(struct arrival *arrival)
{
    uint64_t deadline = now_ns(CLOCK_MONOTONIC) + STATE_MS * NS_PER_MS;
    int error;

    arrival->state = memfd_create(STATE_NAME, MFD_CLOEXEC);
    if (arrival->state < 0)
        return -errno;
    do
        error = read_piece(arrival, deadline);
    while (error == 0);
    if (error < 0)
        return error;
    if (arrival->listener < 0)
        return -EBADF;
    return arrival->extent.complete ? 0 : -EBADMSG;
}

static const char *refusal(int error)
{
    switch (error) {
    case -EPERM:
        return PEER_REFUSED;
    case -E2BIG:
        return "its message is over 1 MiB";
    case -ETIMEDOUT:
        return "its message did not come within 5 seconds";
    case -EBADF:
        return "no seccomp listener came with its message";
    case -EBADMSG:
        return "its message is no JSON object";
    default:
        return strerror(-error);
    }
}

static void refuse(struct monitor *monitor, const struct ucred *peer, int error)
{
    peer_complain(monitor, peer, "agent", refusal(error));
}

static void arrival_end(struct arrival *arrival)
{
    struct monitor *monitor = arrival->monitor;

    {
        LOCKED(&monitor->lock);
        monitor->arriving--;
    }
    monitor_wake(monitor);
    close(arrival->connection);
    free(arrival);
}

/* Owns the listener and the state from here on, and serves until the end. */
static void serve(struct arrival *arrival, int error)
{
    struct listener *listener = NULL;

    const int files[LISTENER_FILES] = {arrival->listener, arrival->state, -1};

    if (!error)
        error = listener_create(arrival->monitor, files, &listener);
    else {
        if (arrival->listener >= 0)
            close(arrival->listener);
        if (arrival->state >= 0)
            close(arrival->state);
    }
    /* A connection that brings nothing at all only wants to know whether somebody is here. */
    if (error && !(error == -EBADF && arrival->size == 0))
        refuse(arrival->monitor, &arrival->peer, error);
    arrival_end(arrival);
    if (!listener)
        return;
    listener_await_supervisor(listener);
    listener_run(listener);
}

static void *arrival_run(void *argument)
{
    struct arrival *arrival = argument;

    serve(arrival, read_state(arrival));
    return NULL;
}

bool agent_is_busy(struct monitor *monitor)
{
    LOCKED(&monitor->lock);

    return monitor->arriving >= ARRIVING_MAX;
}

static int start_arrival(struct monitor *monitor, int connection, const struct ucred *peer)
{
    struct arrival *arrival = calloc(1, sizeof(*arrival));
    int error;

    if (!arrival)
        return -ENOMEM;
    *arrival =
        (struct arrival){.monitor = monitor, .connection = connection, .peer = *peer, .listener = -1, .state = -1};
    {
        LOCKED(&monitor->lock);
        monitor->arriving++;
    }
    error = thread_start(arrival_run, arrival);
    if (error) {
        LOCKED(&monitor->lock);
        monitor->arriving--;
        free(arrival);
    }
    return error;
}

/* Whether there can be as many files more as one that comes may bring and need: a listener that has none is lost. */
static int check_room(const struct monitor *monitor)
{
    int files[ARRIVAL_FILES], count = 0, error;

    while (count < ARRIVAL_FILES && (files[count] = fcntl(monitor->agent, F_DUPFD_CLOEXEC, 0)) >= 0)
        count++;
    error = count < ARRIVAL_FILES ? -errno : 0;
    while (count > 0)
        close(files[--count]);
    return error;
}

/* The next connection: one that there was no thread for, or a new one. */
static int next_connection(struct monitor *monitor)
{
    int connection = monitor->unstarted, error = check_room(monitor);

    if (error)
        return error;
    if (connection < 0)
        connection = accept4(monitor->agent, NULL, NULL, SOCK_CLOEXEC);
    monitor->unstarted = -1;
    return connection < 0 ? -errno : connection;
}

int agent_accept(struct monitor *monitor)
{
    int connection = next_connection(monitor);
    struct ucred peer = {0};
    int error;

    if (connection < 0)
        return connection; /* it hung up meanwhile, or there are no fds: what waits in the backlog is tried again */
    /* A runtime on a busy machine may have exited: refusing would break its container, which must not be. */
    error = peer_check(connection, true, &peer);
    if (!error) {
        error = start_arrival(monitor, connection, &peer);
        if (error) { /* a container whose listener was refused would lose the driver */
            monitor->unstarted = connection;
            return -ENOMEM;
        }
        return 0;
    }
    refuse(monitor, &peer, error);
    peer_hang_up(connection);
    return 0;
}
