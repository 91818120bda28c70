#include "packet.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

uint64_t now_ns(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

void complain(const char *format, ...)
{
    static const char name[] = "mpu-notify-monitor: ";
    struct pollfd polled = {.fd = STDERR_FILENO, .events = POLLOUT};
    char line[512];
    va_list arguments;
    int length;

    va_start(arguments, format);
    length = vsnprintf(line, sizeof(line) - 1, format, arguments);
    va_end(arguments);
    if (length < 0 || poll(&polled, 1, 0) <= 0)
        return;
    if ((size_t)length > sizeof(line) - 2)
        length = sizeof(line) - 2;
    line[length++] = '\n';
    struct iovec parts[2] = {{(void *)(uintptr_t)name, sizeof(name) - 1}, {line, (size_t)length}};
    if (writev(STDERR_FILENO, parts, 2) < 0)
        return;
}

int ms_until(uint64_t deadline)
{
    uint64_t now = now_ns(CLOCK_MONOTONIC);
    uint64_t ms = deadline > now ? (deadline - now) / NS_PER_MS + 1 : 0;

    return ms > INT_MAX ? INT_MAX : (int)ms;
}

void packet_add_fds(struct msghdr *message, struct packet_control *room, const int *fds, size_t n_fds)
{
    size_t size = n_fds * sizeof(int);

    if (!n_fds)
        return;
    message->msg_control = room->bytes;
    message->msg_controllen = sizeof(room->bytes);
    *CMSG_FIRSTHDR(message) =
        (struct cmsghdr){.cmsg_len = CMSG_LEN(size), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(CMSG_FIRSTHDR(message)), fds, size);
    message->msg_controllen = CMSG_SPACE(size);
}

bool is_shortage(int error)
{
    return error == -EMFILE || error == -ENFILE || error == -ETOOMANYREFS || error == -ENOMEM || error == -ENOBUFS;
}

int packet_send(int socket, const struct parcel *parcel, uint64_t deadline)
{
    struct packet_control control = {0};
    struct iovec parts[2] = {{parcel->head, parcel->head_size}, {(void *)(uintptr_t)parcel->body, parcel->body_size}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = parcel->body_size ? 2 : 1};
    struct pollfd polled = {.fd = socket, .events = POLLOUT};

    if (parcel->n_fds > PACKET_FDS_MAX)
        return -EINVAL;
    packet_add_fds(&message, &control, parcel->fds, parcel->n_fds);
    parcel->head->version = MPU_PROTOCOL_VERSION;
    parcel->head->length = (uint32_t)(parcel->head_size + parcel->body_size);
    while (sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
        if (is_shortage(-errno))
            return -errno;
        if (errno != EAGAIN && errno != EINTR)
            return -EPIPE;
        if (poll(&polled, 1, ms_until(deadline)) == 0)
            return -ETIMEDOUT;
    }
    return 0;
}

void packet_close(struct packet *packet)
{
    for (size_t i = 0; i < packet->n_fds; i++)
        close(packet->fds[i]);
    packet->n_fds = 0;
}

static void take_fds(struct packet *packet, struct msghdr *message)
{
    for (struct cmsghdr *at = CMSG_FIRSTHDR(message); at; at = CMSG_NXTHDR(message, at)) {
        if (at->cmsg_level != SOL_SOCKET || at->cmsg_type != SCM_RIGHTS)
            continue;
        packet->n_fds = (at->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(packet->fds, CMSG_DATA(at), packet->n_fds * sizeof(int));
    }
}

int packet_receive(int socket, struct packet *packet)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(PACKET_FDS_MAX * sizeof(int))];
    struct iovec room = {packet->bytes, sizeof(packet->bytes)};
    struct msghdr message = {
        .msg_iov = &room, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    ssize_t got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);

    packet->n_fds = 0;
    if (got < 0)
        return errno == EAGAIN || errno == EINTR ? -EAGAIN : -EPIPE;
    take_fds(packet, &message);
    if (got == 0) { /* an empty packet, which looks like the end, may have brought some */
        packet_close(packet);
        return -EPIPE;
    }
    packet->size = (size_t)got;
    packet->truncated = message.msg_flags & MSG_TRUNC;
    packet->lost_fds = message.msg_flags & MSG_CTRUNC;
    return 0;
}

bool packet_is_stable(const struct packet *packet, enum mpu_type type, size_t size)
{
    return !packet->truncated && packet->size == size && packet->header.length == size && packet->header.type == type;
}

bool packet_is_sound(const struct mpu_header *header, size_t size)
{
    return size >= sizeof(*header) && header->length == size && header->version == MPU_PROTOCOL_VERSION &&
           header->reserved == 0;
}
