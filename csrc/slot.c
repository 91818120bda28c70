#include "slot.h"

#include "cleanup.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

static int map(int fd, struct slot **slot)
{
    void *memory = mmap(NULL, SLOT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    if (memory == MAP_FAILED)
        return -errno;
    *slot = memory;
    return 0;
}

static int init_lock(pthread_mutex_t *lock)
{
    pthread_mutexattr_t attributes;
    int error = pthread_mutexattr_init(&attributes);

    if (error)
        return -error;
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    error = pthread_mutex_init(lock, &attributes);
    pthread_mutexattr_destroy(&attributes);
    return -error;
}

int slot_create(struct slot **slot, int *fd)
{
    AUTO_CLOSE memory = memfd_create(SLOT_NAME, MFD_CLOEXEC);
    uint64_t identity;
    int error;

    if (memory < 0 || ftruncate(memory, SLOT_BYTES) ||
        getrandom(&identity, sizeof(identity), 0) != (ssize_t)sizeof(identity))
        return -errno;
    error = map(memory, slot);
    if (error)
        return error;
    error = init_lock(&(*slot)->lock);
    if (error) {
        slot_unmap(*slot);
        return error;
    }
    (*slot)->identity = identity;
    (*slot)->layout = SLOT_LAYOUT;
    *fd = memory;
    memory = -1;
    return 0;
}

int slot_open(int fd, struct slot **slot)
{
    struct stat status;
    int error;

    if (fstat(fd, &status))
        return -errno;
    if (!S_ISREG(status.st_mode) || status.st_size != SLOT_BYTES)
        return -EPROTO;
    error = map(fd, slot);
    if (!error && (*slot)->layout != SLOT_LAYOUT) {
        slot_unmap(*slot);
        error = -EPROTO;
    }
    return error;
}

int slot_lock(struct slot *slot)
{
    int error = pthread_mutex_lock(&slot->lock);

    if (error == EOWNERDEAD)
        error = pthread_mutex_consistent(&slot->lock);
    return -error;
}

void slot_unlock(struct slot *slot)
{
    pthread_mutex_unlock(&slot->lock);
}

void slot_unmap(struct slot *slot)
{
    munmap(slot, SLOT_BYTES);
}
