/* Ownership by cleanup attributes. */
#ifndef MPU_CLEANUP_H
#define MPU_CLEANUP_H

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static inline void cleanup_close(const int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

static inline void cleanup_free(void *pointer)
{
    free(*(void **)pointer);
}

static inline void cleanup_unlock(pthread_mutex_t **lock)
{
    pthread_mutex_unlock(*lock);
}

static inline pthread_mutex_t *locked(pthread_mutex_t *lock)
{
    pthread_mutex_lock(lock);
    return lock;
}

#define AUTO_CLOSE __attribute__((cleanup(cleanup_close))) int
#define AUTO_FREE __attribute__((cleanup(cleanup_free)))
/* Holds `lock` until the end of the scope. */
#define LOCKED(lock) __attribute__((cleanup(cleanup_unlock), unused)) pthread_mutex_t *lock_held_here = locked(lock)

#endif
