/* A listener's life: receive its calls one by one until the last user of the filter is gone. */
#include "cleanup.h"
#include "monitor.h"
#include "packet.h"

#include <errno.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS /* linux/seccomp.h, Linux 6.6 */
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (1UL << 0)
#endif

#define END_WAIT_MS 1000 /* for the supervisor to take in that a listener has ended */

static bool filter_has_users(int fd)
{
    struct pollfd polled = {.fd = fd, .events = POLLIN};

    return poll(&polled, 1, 0) < 0 || !(polled.revents & POLLHUP);
}

/* 0 with a notification in listener->notif, -ENODEV where none will ever come again. */
static int receive(struct listener *listener)
{
    struct pollfd polled = {.fd = listener->fd, .events = POLLIN};

    if (!listener->monitor->kernel.receive_ends) {
        if (poll(&polled, 1, -1) < 0)
            return -errno;
        if (!(polled.revents & POLLIN))
            return polled.revents & POLLHUP ? -ENODEV : -EAGAIN;
    }
    memset(listener->notif, 0, listener->notif_size); /* the kernel insists */
    if (ioctl(listener->fd, SECCOMP_IOCTL_NOTIF_RECV, listener->notif) == 0)
        return 0;
    if (errno == ENOENT) /* that caller was killed before receipt, or the last user is gone */
        return filter_has_users(listener->fd) ? -EAGAIN : -ENODEV;
    return -errno;
}

static void listener_free(struct listener *listener)
{
    close(listener->fd);
    close(listener->state);
    if (listener->channel >= 0)
        close(listener->channel);
    free(listener->notif);
    free(listener->response);
    free(listener);
}

static void listener_unlink(struct listener *listener)
{
    struct monitor *monitor = listener->monitor;
    LOCKED(&monitor->lock);

    for (struct listener **at = &monitor->listeners; *at; at = &(*at)->next)
        if (*at == listener) {
            *at = listener->next;
            break;
        }
    monitor_wake(monitor);
}

void *listener_run(void *argument)
{
    struct listener *listener = argument;
    bool complained = false;
    int error;

    while ((error = receive(listener)) != -ENODEV) {
        if (!error) {
            call_handle(listener);
        } else if (error != -EAGAIN && error != -EINTR) {
            /* Giving the listener up would break every later call in the container: say it once and go on trying. */
            if (!complained)
                complain("cannot receive on listener %u: %s; trying on", (unsigned)listener->id, strerror(-error));
            complained = true;
            nanosleep(&(struct timespec){.tv_nsec = 100 * (long)NS_PER_MS}, NULL);
        }
    }
    listener->counts.header.type = MPU_ENDED;
    listener_tell(listener, &listener->counts.header, sizeof(listener->counts),
                  now_ns(CLOCK_MONOTONIC) + END_WAIT_MS * NS_PER_MS);
    listener_unlink(listener);
    listener_free(listener);
    return NULL;
}

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Every allocation of a listener's life: a call allocates nothing that is not in the table. */
static int listener_allocate(struct listener *listener)
{
    struct seccomp_notif_sizes sizes;

    if (syscall(SYS_seccomp, SECCOMP_GET_NOTIF_SIZES, 0, &sizes))
        return -errno;
    listener->notif_size = larger(sizes.seccomp_notif, sizeof(struct seccomp_notif));
    listener->response_size = larger(sizes.seccomp_notif_resp, sizeof(struct seccomp_notif_resp));
    listener->notif = calloc(1, listener->notif_size);
    listener->response = calloc(1, listener->response_size);
    return listener->notif && listener->response ? 0 : -ENOMEM;
}

static void listener_link(struct listener *listener)
{
    struct monitor *monitor = listener->monitor;
    LOCKED(&monitor->lock);

    listener->id = ++monitor->last_id;
    listener->next = monitor->listeners;
    monitor->listeners = listener;
}

/* A channel with nobody at its other end, until a supervisor is given that. */
static int open_channel(struct listener *listener)
{
    int ends[2];

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
        return -errno;
    listener->channel = ends[0];
    close(ends[1]);
    return 0;
}

int listener_create(struct monitor *monitor, int fd, int state, struct listener **created)
{
    struct listener *listener = calloc(1, sizeof(*listener));
    int error;

    if (!listener) {
        close(fd);
        close(state);
        return -ENOMEM;
    }
    listener->monitor = monitor;
    listener->fd = fd;
    listener->state = state;
    listener->channel = -1;
    error = listener_allocate(listener);
    if (!error)
        error = open_channel(listener);
    if (error) {
        listener_free(listener);
        return error;
    }
    /* Kernels before 6.6 refuse, and are only slower. */
    ioctl(fd, SECCOMP_IOCTL_NOTIF_SET_FLAGS, (uint64_t)SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
    listener_link(listener);
    *created = listener;
    return 0;
}

void listener_await_supervisor(struct listener *listener)
{
    struct monitor *monitor = listener->monitor;
    struct timespec until;
    LOCKED(&monitor->lock);
    int error = 0;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 1;
    while (monitor->has_supervisor && !listener->announced && !error)
        error = pthread_cond_timedwait(&monitor->told, &monitor->lock, &until);
}

int listener_start(struct listener *listener)
{
    int error = thread_start(listener_run, listener);

    if (error) {
        listener_unlink(listener);
        listener_free(listener);
    }
    return error;
}
