/*
 * Who serves the sockets of a daemon's monitor: the process that has claimed the one by which supervisors come. A claim
 * is a record lock on one byte of that socket (fcntl(2)), so it goes with the process, however that ends, and others
 * that have the same socket do not keep it.
 *
 * A killed process keeps its locks for as long as one of its threads waits where it cannot be killed, as the server of
 * a FUSE file can bring about. Its claim counts no more, and the next monitor takes another byte.
 */
#ifndef MPU_CLAIM_H
#define MPU_CLAIM_H

#include "cleanup.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define MPU_CLAIMS 16 /* monitors that are killed and cannot end, and one that lives */
#define MPU_STAT_BYTES 512

/* Whether a process was killed or has ended, though it may not be gone: proc_pid_stat(5), its state. */
static inline bool mpu_is_dead(pid_t pid)
{
    char path[32], text[MPU_STAT_BYTES];
    const char *name_end;
    ssize_t length;
    AUTO_CLOSE file = -1;

    snprintf(path, sizeof(path), "/proc/%d/stat", pid);
    file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return errno == ENOENT;
    length = read(file, text, sizeof(text) - 1);
    if (length <= 0)
        return length < 0 && errno == ESRCH;
    text[length] = 0;
    name_end = strrchr(text, ')');
    return name_end && (strncmp(name_end, ") Z", 3) == 0 || strncmp(name_end, ") X", 3) == 0);
}

static inline struct flock mpu_claim_lock(short type, int number)
{
    return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = number, .l_len = 1};
}

/* Whether a process that lives, but not this one, has claimed the sockets; the first byte that nobody has, or -1. */
static inline bool mpu_is_claimed(int control, int *unclaimed)
{
    *unclaimed = -1;
    for (int number = 0; number < MPU_CLAIMS; number++) {
        struct flock found = mpu_claim_lock(F_WRLCK, number);

        if (fcntl(control, F_GETLK, &found))
            return true;
        if (found.l_type != F_UNLCK && !mpu_is_dead(found.l_pid))
            return true;
        if (found.l_type == F_UNLCK && *unclaimed < 0)
            *unclaimed = number;
    }
    return *unclaimed < 0;
}

#endif
