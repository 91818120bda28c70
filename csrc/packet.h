/* Sending and receiving packets of protocol.h. 0 or a negative errno, as everywhere in the monitor. */
#ifndef MPU_PACKET_H
#define MPU_PACKET_H

#include "protocol.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <time.h>

#define NS_PER_MS UINT64_C(1000000)

uint64_t now_ns(clockid_t clock);

/* A line on standard error, lost where nobody reads there: no caller shall wait for that. */
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* From now until a deadline (CLOCK_MONOTONIC, ns), for poll: rounded up, 0 where it has passed. */
int ms_until(uint64_t deadline);

#define PACKET_FDS_MAX 4

/* What one packet on the supervisor's or another monitor's socket brought. packet_close closes fds not claimed. */
struct packet {
    size_t size;
    int fds[PACKET_FDS_MAX];
    size_t n_fds;
    bool truncated;
    bool lost_fds; /* there were more than we may have open, or take */
    union {
        struct mpu_header header;
        struct mpu_hello hello;
        struct mpu_configure configure;
        uint8_t bytes[sizeof(struct mpu_configure) + MPU_MAX_CONTROLS * sizeof(struct mpu_control)];
    };
};

/* What is sent: a head, whose length and version are filled in, then a body, and with them some fds. */
struct parcel {
    struct mpu_header *head;
    size_t head_size;
    const void *body;
    size_t body_size;
    const int *fds;
    size_t n_fds;
};

/* Room for PACKET_FDS_MAX fds beside a message. */
struct packet_control {
    _Alignas(struct cmsghdr) char bytes[CMSG_SPACE(PACKET_FDS_MAX * sizeof(int))];
};

/* Have fds, at most PACKET_FDS_MAX, go with a message. The room must last until it is sent. */
void packet_add_fds(struct msghdr *message, struct packet_control *room, const int *fds, size_t n_fds);

/* Whether a negative errno says that there are no files, or no memory, for now. */
bool is_shortage(int error);

/*
 * Waits for room until the deadline; -EPIPE where the other end is gone, -ETIMEDOUT where there was no room, another
 * one where there is a shortage.
 */
int packet_send(int socket, const struct parcel *parcel, uint64_t deadline);

/* The next packet; -EAGAIN where there is none, -EPIPE at the end. */
int packet_receive(int socket, struct packet *packet);

void packet_close(struct packet *packet);

/* Whether a packet of this size begins with a header that says so, in our version. */
bool packet_is_sound(const struct mpu_header *header, size_t size);

/* Whether it is a whole packet of this type, one of those that are the same in every version. */
bool packet_is_stable(const struct packet *packet, enum mpu_type type, size_t size);

#endif
