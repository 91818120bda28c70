#include "handover.h"

#include "agent.h"
#include "claim.h"
#include "cleanup.h"
#include "peer.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define TAKE_OVER_MS 10000 /* for the other monitor to answer */
#define HAND_OVER_MS 1000  /* for the other monitor to make room for a packet */
#define GIVE_BACK_MS 100   /* for the other monitor to answer; it is asked again */

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    AUTO_CLOSE fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int result;

    if (fd < 0)
        return -errno;
    if (strlen(path) >= sizeof(address.sun_path))
        return -ENAMETOOLONG;
    strcpy(address.sun_path, path);
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)))
        return -errno;
    result = peer_check_listener(fd);
    if (result)
        return result;
    result = fd;
    fd = -1;
    return result;
}

static int receive_hello(int socket, struct packet *packet, uint64_t deadline)
{
    struct pollfd polled = {.fd = socket, .events = POLLIN};
    int error;

    do
        if (poll(&polled, 1, ms_until(deadline)) == 0)
            return -ETIMEDOUT;
    while ((error = packet_receive(socket, packet)) == -EAGAIN);
    if (error)
        return error;
    if (packet_is_stable(packet, MPU_HELLO, sizeof(packet->hello)) && packet->n_fds == 2)
        return 0;
    packet_close(packet);
    return -EPROTO;
}

int take_over(struct monitor *monitor, const char *control)
{
    struct mpu_take_over ask = {.header = {.type = MPU_TAKE_OVER}};
    const struct parcel parcel = {.head = &ask.header, .head_size = sizeof(ask)};
    uint64_t deadline = now_ns(CLOCK_MONOTONIC) + TAKE_OVER_MS * NS_PER_MS;
    AUTO_FREE struct packet *packet = malloc(sizeof(*packet));
    AUTO_CLOSE other = connect_to(control);
    int error = !packet ? -ENOMEM : other < 0 ? other : receive_hello(other, packet, deadline);

    if (error)
        return error;
    monitor->agent = packet->fds[0];
    monitor->control = packet->fds[1];
    error = packet_send(other, &parcel, deadline);
    if (error)
        return error;
    monitor->predecessor = other;
    other = -1;
    return 0;
}

int claim(struct monitor *monitor)
{
    struct flock ours;
    int number, other;

    if (mpu_is_claimed(monitor->control, &number))
        return -EAGAIN;
    ours = mpu_claim_lock(F_WRLCK, number);
    if (fcntl(monitor->control, F_SETLK, &ours))
        return -errno;
    if (mpu_is_claimed(monitor->control, &other)) { /* at the same moment, by another number */
        ours.l_type = F_UNLCK;
        fcntl(monitor->control, F_SETLK, &ours);
        return -EAGAIN;
    }
    monitor->is_sole = true;
    return 0;
}

int connect_to_sole(const struct monitor *monitor)
{
    struct mpu_give_back give = {.header = {.type = MPU_GIVE_BACK}};
    const struct parcel parcel = {.head = &give.header, .head_size = sizeof(give)};
    uint64_t deadline = now_ns(CLOCK_MONOTONIC) + GIVE_BACK_MS * NS_PER_MS;
    AUTO_FREE struct packet *packet = malloc(sizeof(*packet));
    struct sockaddr_un address = {0};
    socklen_t size = sizeof(address) - 1;
    AUTO_CLOSE other = -1;
    int error, result;

    if (!packet || getsockname(monitor->control, (struct sockaddr *)&address, &size))
        return -ENOMEM;
    other = connect_to(address.sun_path);
    error = other < 0 ? other : receive_hello(other, packet, deadline);
    if (error)
        return error;
    packet_close(packet);
    error = packet_send(other, &parcel, deadline);
    if (error)
        return error;
    result = other;
    other = -1;
    return result;
}

int adopt(struct monitor *monitor, struct packet *packet)
{
    struct listener *listener;
    int error;

    if (packet->n_fds != LISTENER_FILES)
        return packet->lost_fds ? -EMFILE : -EPROTO;
    if (!is_listener(packet->fds[FILE_LISTENER]))
        return -EBADF;
    packet->n_fds = 0; /* listener_create owns them now */
    error = listener_create(monitor, packet->fds, &listener);
    if (error == -EEXIST)
        return 0;
    return error ? error : listener_start(listener);
}

void hand_over(struct monitor *monitor, int successor)
{
    LOCKED(&monitor->lock);

    if (monitor->successor >= 0)
        close(monitor->successor);
    monitor->successor = successor;
    monitor->yielding = true;
}

static void drop_successor(struct monitor *monitor)
{
    if (monitor->successor < 0)
        return;
    close(monitor->successor);
    monitor->successor = -1;
    monitor->yielding = false;
    monitor_wake(monitor);
}

void lose_successor(struct monitor *monitor)
{
    LOCKED(&monitor->lock);

    drop_successor(monitor);
}

void hurry(struct monitor *monitor)
{
    LOCKED(&monitor->lock);

    for (struct listener *at = monitor->listeners; at; at = at->next)
        if (at->running && at->receiving)
            pthread_kill(at->thread, SIGUSR1);
}

bool listener_hand_over(struct listener *listener)
{
    struct monitor *monitor = listener->monitor;
    struct mpu_adopt adoption = {.header = {.type = MPU_ADOPT, .listener = listener->id}};
    const int files[LISTENER_FILES] = {listener->fd, listener->state, listener->slot_fd};
    const struct parcel parcel = {
        .head = &adoption.header, .head_size = sizeof(adoption), .fds = files, .n_fds = LISTENER_FILES};
    LOCKED(&monitor->lock);

    if (monitor->successor < 0)
        return monitor->yielding; /* to whoever keeps it */
    if (packet_send(monitor->successor, &parcel, now_ns(CLOCK_MONOTONIC) + HAND_OVER_MS * NS_PER_MS) == 0)
        return true;
    drop_successor(monitor);
    return false;
}
