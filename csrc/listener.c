/* A listener's life: receive its calls one by one, until the last user of the filter is gone. */
#include "cleanup.h"
#include "handover.h"
#include "keeper.h"
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

static int wait_for_call(const struct listener *listener)
{
    struct pollfd polled = {.fd = listener->fd, .events = POLLIN};

    if (poll(&polled, 1, -1) < 0)
        return -errno;
    if (polled.revents & POLLIN)
        return 0;
    return polled.revents & POLLHUP ? -ENODEV : -EAGAIN;
}

/* The slot is not ours alone: what it says of a call is looked at once. */
static void take_notif(struct listener *listener)
{
    memcpy(listener->notif, listener->slot->notif, listener->notif_size);
}

/* Where a signal of the main thread may interrupt: nothing has been received, or it is in the slot. */
static int receive_interruptibly(struct listener *listener)
{
    int error = listener->monitor->kernel.receive_ends ? 0 : wait_for_call(listener);

    if (error)
        return error;
    if (ioctl(listener->fd, SECCOMP_IOCTL_NOTIF_RECV, listener->slot->notif))
        return -errno;
    take_notif(listener);
    return 0;
}

/* 0 with a call in listener->notif; -ENODEV where none will ever come again, -ECANCELED where it is to be let go. */
static int receive(struct listener *listener)
{
    int error = -ECANCELED;

    memset(listener->slot->notif, 0, listener->notif_size); /* the kernel insists */
    listener->slot->input = (struct slot_input){0};
    listener->receiving = true;
    if (!listener->monitor->yielding)
        error = receive_interruptibly(listener);
    listener->receiving = false;
    if (error == -ENOENT) /* that caller was killed before receipt, or the last user is gone */
        return filter_has_users(listener->fd) ? -EAGAIN : -ENODEV;
    return error;
}

static void listener_free(struct listener *listener)
{
    close(listener->fd);
    close(listener->state);
    if (listener->slot_fd >= 0)
        close(listener->slot_fd);
    if (listener->channel >= 0)
        close(listener->channel);
    if (listener->fresh >= 0)
        close(listener->fresh);
    if (listener->slot)
        slot_unmap(listener->slot);
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
    config_release(listener->config); /* here, because the monitor may end as soon as it is unlinked */
    monitor_wake(monitor);
}

/* Serve calls until there will be none, -ENODEV, or the listener is to be let go, -ECANCELED. */
static int serve_calls(struct listener *listener)
{
    bool complained = false;
    int error;

    while ((error = receive(listener)) != -ENODEV && error != -ECANCELED) {
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
    return error;
}

/* Begin where another monitor ended: what it had received and not answered is the driver's to answer. */
static void listener_begin(struct listener *listener)
{
    struct monitor *monitor = listener->monitor;

    slot_lock(listener->slot);
    take_notif(listener);
    if (listener->notif->id)
        call_leave(listener);
    LOCKED(&monitor->lock);
    listener->thread = pthread_self();
    listener->running = true;
}

void listener_take_channel(struct listener *listener)
{
    LOCKED(&listener->monitor->lock);

    if (listener->fresh < 0)
        return;
    if (listener->channel >= 0)
        close(listener->channel);
    listener->channel = listener->fresh;
    listener->fresh = -1;
    listener->silent_until = 0;
}

static void say_end(struct listener *listener)
{
    struct mpu_ended ended = {.header = {.type = MPU_ENDED}, .counts = listener->slot->counts};

    listener_take_channel(listener);
    listener_tell(listener, &ended.header, sizeof(ended), now_ns(CLOCK_MONOTONIC) + END_WAIT_MS * NS_PER_MS);
}

void *listener_run(void *argument)
{
    struct listener *listener = argument;
    int error;

    listener_begin(listener);
    do
        error = serve_calls(listener);
    while (error == -ECANCELED && !listener_hand_over(listener));
    if (error == -ENODEV) {
        say_end(listener);
        keeper_forget(listener);
    }
    listener_unlink(listener);
    slot_unlock(listener->slot);
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
    int error = listener->slot_fd < 0 ? slot_create(&listener->slot, &listener->slot_fd)
                                      : slot_open(listener->slot_fd, &listener->slot);

    if (error)
        return error;

    if (syscall(SYS_seccomp, SECCOMP_GET_NOTIF_SIZES, 0, &sizes))
        return -errno;
    listener->notif_size = larger(sizes.seccomp_notif, sizeof(struct seccomp_notif));
    listener->response_size = larger(sizes.seccomp_notif_resp, sizeof(struct seccomp_notif_resp));
    if (listener->notif_size > SLOT_NOTIF_BYTES)
        return -E2BIG;
    listener->notif = calloc(1, listener->notif_size);
    listener->response = calloc(1, listener->response_size);
    return listener->notif && listener->response ? 0 : -ENOMEM;
}

/* -EEXIST where it is there already. */
static int listener_link(struct listener *listener)
{
    struct monitor *monitor = listener->monitor;
    LOCKED(&monitor->lock);

    for (struct listener *at = monitor->listeners; at; at = at->next)
        if (at->slot->identity == listener->slot->identity)
            return -EEXIST;
    listener->id = ++monitor->last_id;
    listener->next = monitor->listeners;
    monitor->listeners = listener;
    return 0;
}

int listener_create(struct monitor *monitor, const int files[LISTENER_FILES], struct listener **created)
{
    struct listener *listener = calloc(1, sizeof(*listener));
    int error;

    if (!listener) {
        for (int i = 0; i < LISTENER_FILES; i++)
            if (files[i] >= 0)
                close(files[i]);
        return -ENOMEM;
    }
    listener->monitor = monitor;
    listener->fd = files[FILE_LISTENER];
    listener->state = files[FILE_STATE];
    listener->slot_fd = files[FILE_SLOT];
    listener->channel = listener->fresh = -1;
    error = listener_allocate(listener);
    /* Kernels before 6.6 refuse, and are only slower. */
    if (!error)
        ioctl(listener->fd, SECCOMP_IOCTL_NOTIF_SET_FLAGS, (uint64_t)SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
    if (!error)
        error = listener_link(listener);
    if (error) {
        listener_free(listener);
        return error;
    }
    keeper_remember(listener);
    *created = listener;
    return 0;
}

void listener_await_supervisor(struct listener *listener)
{
    struct monitor *monitor = listener->monitor;
    struct timespec until;
    LOCKED(&monitor->lock);
    int error = 0;

    clock_gettime(CLOCK_MONOTONIC, &until);
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
