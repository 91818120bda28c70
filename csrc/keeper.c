#include "keeper.h"

#include "agent.h"
#include "cleanup.h"
#include "packet.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define FIRST_FD 3         /* SD_LISTEN_FDS_START */
#define NAME_PREFIX "mpu-" /* of a listener's files, before its identity */
#define NAME_MAX_BYTES 32
#define SEND_MS 1000

static const char *keeper_address(void)
{
    const char *address = getenv("NOTIFY_SOCKET");

    return address && (*address == '/' || *address == '@') ? address : NULL;
}

bool keeper_is_there(void)
{
    return keeper_address() != NULL;
}

/* One message. It is lost where nobody takes it: we must not hang on whoever keeps us. */
static void say(const char *text, const int *fds, size_t n_fds)
{
    struct packet_control control = {0};
    const char *path = keeper_address();
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct iovec part = {(void *)(uintptr_t)text, strlen(text)};
    struct msghdr message = {.msg_name = &address, .msg_iov = &part, .msg_iovlen = 1};
    struct timeval patience = {.tv_sec = SEND_MS / 1000};
    AUTO_CLOSE fd = -1;

    if (!path || strlen(path) >= sizeof(address.sun_path))
        return;
    fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    strcpy(address.sun_path, path);
    message.msg_namelen = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path));
    if (*path == '@')
        address.sun_path[0] = 0;
    packet_add_fds(&message, &control, fds, n_fds);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience)) ||
        sendmsg(fd, &message, MSG_NOSIGNAL) < 0)
        complain("cannot tell the service manager '%s': %s", text, strerror(errno));
}

void keeper_say_ready(void)
{
    say("READY=1\n", NULL, 0);
}

uint64_t keeper_watches_every(void)
{
    const char *pid = getenv("WATCHDOG_PID"), *us = getenv("WATCHDOG_USEC");

    if (!us || (pid && strtol(pid, NULL, 10) != getpid()))
        return 0;
    return strtoull(us, NULL, 10) * 1000 / 2; /* as sd_watchdog_enabled(3) recommends */
}

void keeper_say_alive(void)
{
    say("WATCHDOG=1\n", NULL, 0);
}

void keeper_remember(const struct listener *listener)
{
    const int files[LISTENER_FILES] = {listener->fd, listener->state, listener->slot_fd};
    char text[64];

    if (!listener->monitor->is_kept)
        return;
    snprintf(text, sizeof(text), "FDSTORE=1\nFDNAME=" NAME_PREFIX "%016" PRIx64 "\n", listener->slot->identity);
    say(text, files, LISTENER_FILES);
}

void keeper_forget(const struct listener *listener)
{
    char text[64];

    if (!listener->monitor->is_kept)
        return;
    snprintf(text, sizeof(text), "FDSTOREREMOVE=1\nFDNAME=" NAME_PREFIX "%016" PRIx64 "\n", listener->slot->identity);
    say(text, NULL, 0);
}

/* Which of a listener's files this is, -1 where it is none: their order in the store is not kept. */
static int kind_of(int fd)
{
    static const char slot[] = "/memfd:" SLOT_NAME, state[] = "/memfd:" STATE_NAME;
    char path[64], target[64];
    ssize_t length;

    if (is_listener(fd))
        return FILE_LISTENER;
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    length = readlink(path, target, sizeof(target));
    if (length >= (ssize_t)sizeof(slot) - 1 && memcmp(target, slot, sizeof(slot) - 1) == 0)
        return FILE_SLOT;
    return length >= (ssize_t)sizeof(state) - 1 && memcmp(target, state, sizeof(state) - 1) == 0 ? FILE_STATE : -1;
}

/* The files of one listener that were found so far, under the name that they were stored by. */
struct stored {
    char name[NAME_MAX_BYTES];
    int files[LISTENER_FILES];
};

static struct stored *stored_as(struct stored *all, size_t *count, const char *name)
{
    for (size_t i = 0; i < *count; i++)
        if (strcmp(all[i].name, name) == 0)
            return &all[i];
    all[*count] = (struct stored){.files = {-1, -1, -1}};
    strcpy(all[*count].name, name);
    return &all[(*count)++];
}

static void sort_in(struct stored *all, size_t *count, const char *name, int fd)
{
    struct stored *whose;
    int kind = kind_of(fd);

    fcntl(fd, F_SETFD, FD_CLOEXEC);
    if (kind < 0 || strlen(name) >= NAME_MAX_BYTES) {
        close(fd);
        return;
    }
    whose = stored_as(all, count, name);
    if (whose->files[kind] >= 0)
        close(fd);
    else
        whose->files[kind] = fd;
}

static int serve_stored(struct monitor *monitor, const struct stored *stored)
{
    struct listener *listener;
    int error;

    if (stored->files[FILE_LISTENER] < 0 || stored->files[FILE_STATE] < 0 || stored->files[FILE_SLOT] < 0) {
        for (int i = 0; i < LISTENER_FILES; i++)
            if (stored->files[i] >= 0)
                close(stored->files[i]);
        return -ENOENT;
    }
    error = listener_create(monitor, stored->files, &listener);
    if (!error)
        error = listener_start(listener);
    return error;
}

/* How many fds there are for us from FIRST_FD on. */
static int count_fds(void)
{
    const char *pid = getenv("LISTEN_PID"), *fds = getenv("LISTEN_FDS");
    long count = pid && fds && strtol(pid, NULL, 10) == getpid() ? strtol(fds, NULL, 10) : 0;

    return count > 0 && count < INT_MAX - FIRST_FD ? (int)count : 0;
}

int keeper_restore(struct monitor *monitor)
{
    const char *given = getenv("LISTEN_FDNAMES");
    AUTO_FREE char *names = strdup(given ? given : "");
    int total = count_fds(), error = 0;
    AUTO_FREE struct stored *all = calloc((size_t)total + 1, sizeof(*all));
    char *rest = names, *name;
    size_t count = 0;

    if (!names || !all)
        return -ENOMEM;
    for (int fd = FIRST_FD; fd < FIRST_FD + total && (name = strsep(&rest, ":")); fd++)
        if (fd != monitor->agent && fd != monitor->control)
            sort_in(all, &count, name, fd);
    for (size_t i = 0; i < count; i++) {
        error = serve_stored(monitor, &all[i]);
        if (error)
            complain("cannot serve %s, which the service manager stored: %s", all[i].name, strerror(-error));
    }
    return 0;
}
