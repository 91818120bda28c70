/* Sending and receiving packets of protocol.h. 0 or a negative errno, as everywhere in the monitor. */
#ifndef MPU_PACKET_H
#define MPU_PACKET_H

#include "protocol.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define NS_PER_MS UINT64_C(1000000)

uint64_t now_ns(clockid_t clock);

/* A line on standard error, lost where nobody reads there: no caller shall wait for that. */
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* From now until a deadline (CLOCK_MONOTONIC, ns), for poll: rounded up, 0 where it has passed. */
int ms_until(uint64_t deadline);

#define PACKET_FDS_MAX 2

/* What is sent: a head, whose length and version are filled in, then a body, and with them some fds. */
struct parcel {
    struct mpu_header *head;
    size_t head_size;
    const void *body;
    size_t body_size;
    const int *fds;
    size_t n_fds;
};

/* Waits for room until the deadline; -EPIPE where the other end is gone, -ETIMEDOUT where there was no room. */
int packet_send(int socket, const struct parcel *parcel, uint64_t deadline);

/* Whether a packet of this size begins with a header that says so, in our version. */
bool packet_is_sound(const struct mpu_header *header, size_t size);

#endif
