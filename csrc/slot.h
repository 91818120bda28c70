/*
 * A listener's slot: the memory that its calls are received into, shared by memfd with whoever may have to go on after
 * us. A received notification is never delivered again, so its id must outlive the monitor that received it.
 *
 * Who holds the lock serves the listener. The lock is robust: the kernel opens it when the thread that holds it ends,
 * however that comes, and the next one finds in the slot what was not answered. The layout is the same in every
 * version; what is added comes last, and is 0 in a slot of a version without it.
 */
#ifndef MPU_SLOT_H
#define MPU_SLOT_H

#include "protocol.h"

#include <assert.h>
#include <pthread.h>
#include <stdint.h>

#define SLOT_NAME "mpu-notify slot"
#define SLOT_LAYOUT 1
#define SLOT_BYTES 4096
#define SLOT_NOTIF_BYTES 1024 /* struct seccomp_notif has 80, and may grow */

/*
 * What the caller asked with and the answer takes the place of: how many entries its table has room for. Whoever leaves
 * the call to the driver after all puts it back first.
 */
struct slot_input {
    uint32_t is_due;   /* 1: the answer may have been written over it */
    uint32_t count_at; /* in the params, bytes */
    uint32_t count;
    uint32_t reserved;
};

struct slot {
    uint32_t layout;
    uint32_t reserved;
    uint64_t identity; /* of the listener, for good */
    pthread_mutex_t lock;
    struct mpu_counts counts;
    _Alignas(64) uint8_t notif[SLOT_NOTIF_BYTES];
    struct slot_input input;
};
static_assert(sizeof(struct slot) <= SLOT_BYTES, "a slot is one page");

/* A slot for a new listener, and its memfd; slot_close ends both. */
int slot_create(struct slot **slot, int *fd);

/* The slot behind a memfd, which stays the caller's of this function. -EPROTO where it is none. */
int slot_open(int fd, struct slot **slot);

/* Waits until nobody else serves the listener. */
int slot_lock(struct slot *slot);

void slot_unlock(struct slot *slot);

void slot_unmap(struct slot *slot);

#endif
