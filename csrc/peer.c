#include "peer.h"

#include "cleanup.h"
#include "monitor.h"
#include "packet.h"

#include <errno.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#define LINES_AT_ONCE 32
#define LINE_EVERY_MS 5000

static int check_user(const struct ucred *peer)
{
    return peer->uid == 0 || peer->uid == geteuid() ? 0 : -EPERM;
}

static int check_namespace(pid_t pid, bool may_have_exited)
{
    char path[64];
    struct stat theirs, ours;

    if (pid <= 0) /* not even visible from our namespace */
        return -EPERM;
    snprintf(path, sizeof(path), "/proc/%d/ns/pid", pid);
    if (stat(path, &theirs))
        return may_have_exited && (errno == ENOENT || errno == ESRCH) ? 0 : -EPERM;
    if (stat("/proc/self/ns/pid", &ours))
        return -EPERM;
    return theirs.st_dev == ours.st_dev && theirs.st_ino == ours.st_ino ? 0 : -EPERM;
}

static int find_peer(int connection, struct ucred *peer)
{
    socklen_t size = sizeof(*peer);

    return getsockopt(connection, SOL_SOCKET, SO_PEERCRED, peer, &size) ? -errno : check_user(peer);
}

int peer_check(int connection, bool may_have_exited, struct ucred *peer)
{
    int error = find_peer(connection, peer);

    return error ? error : check_namespace(peer->pid, may_have_exited);
}

int peer_check_listener(int connection)
{
    struct ucred peer;

    return find_peer(connection, &peer);
}

/* Whether one more line may be said; then also how many were left out before it. */
static bool is_allowed(struct monitor *monitor, unsigned *left_out)
{
    const uint64_t each = LINE_EVERY_MS * NS_PER_MS;
    uint64_t now = now_ns(CLOCK_MONOTONIC);
    LOCKED(&monitor->lock);

    if (monitor->said_until < now)
        monitor->said_until = now;
    if (monitor->said_until + each > now + LINES_AT_ONCE * each) {
        monitor->left_out++;
        return false;
    }
    monitor->said_until += each;
    *left_out = monitor->left_out;
    monitor->left_out = 0;
    return true;
}

void peer_complain(struct monitor *monitor, const struct ucred *peer, const char *socket, const char *why)
{
    unsigned left_out;

    if (!is_allowed(monitor, &left_out))
        return;
    if (left_out)
        complain("refused %u more processes, which were not named", left_out);
    complain("refused process %d of user %u on the %s socket: %s", (int)peer->pid, (unsigned)peer->uid, socket, why);
}

static void *close_it(void *connection)
{
    close((int)(intptr_t)connection);
    return NULL;
}

void peer_hang_up(int connection)
{
    if (thread_start(close_it, (void *)(intptr_t)connection))
        close(connection);
}
