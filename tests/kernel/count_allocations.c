/*
 * Preloaded into a program, counts its allocations in a u64 at the start of the file that COUNT_ALLOCATIONS_IN names.
 * Not counted: what the C library maps for itself, such as a thread's stack; its heap grows only in a counted call.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *old, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void *pointer);

static _Atomic uint64_t too_early; /* the dynamic loader allocates before us */
static _Atomic uint64_t *counter = &too_early;

static void *map(void *address, size_t size, int protection, int flags, int fd, off_t offset)
{
    return (void *)syscall(SYS_mmap, address, size, protection, flags, fd, offset);
}

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("COUNT_ALLOCATIONS_IN");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *shared = fd < 0 ? MAP_FAILED : map(NULL, sizeof(*counter), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    if (shared == MAP_FAILED) {
        perror("count_allocations: map the file that COUNT_ALLOCATIONS_IN names");
        _exit(1);
    }
    close(fd);
    counter = shared;
}

void *malloc(size_t size)
{
    ++*counter;
    return __libc_malloc(size);
}

void *calloc(size_t count, size_t size)
{
    ++*counter;
    return __libc_calloc(count, size);
}

void *realloc(void *old, size_t size)
{
    ++*counter;
    return __libc_realloc(old, size);
}

void *memalign(size_t alignment, size_t size)
{
    ++*counter;
    return __libc_memalign(alignment, size);
}

void *aligned_alloc(size_t alignment, size_t size)
{
    return memalign(alignment, size);
}

int posix_memalign(void **result, size_t alignment, size_t size)
{
    *result = memalign(alignment, size);
    return *result ? 0 : ENOMEM;
}

void free(void *pointer)
{
    ++*counter;
    __libc_free(pointer);
}

void *mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset)
{
    ++*counter;
    return map(address, size, protection, flags, fd, offset);
}

void *mmap64(void *address, size_t size, int protection, int flags, int fd, off64_t offset)
{
    return mmap(address, size, protection, flags, fd, offset);
}
