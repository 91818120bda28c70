/*
 * What the fuzz targets share. Each includes the .c file that it is about, so that it reaches the static functions, and
 * is linked with an archive of the others. The working directory is its own: files in it may be made and read.
 */
#ifndef MPU_FUZZ_H
#define MPU_FUZZ_H

#include "cleanup.h"

#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What must hold for every input; libFuzzer shows the line and keeps the input. */
#define EXPECT(condition) ((condition) ? (void)0 : abort())

#define FDS_MAX 64

/* What is left of an input. */
struct input {
    const uint8_t *at;
    size_t left;
};

/* A text with a 0 behind it, in a piece of memory that has not one byte more. */
struct text {
    char *bytes;
    size_t size;
};

static inline void cleanup_text(struct text *text)
{
    free(text->bytes);
}

#define AUTO_TEXT __attribute__((cleanup(cleanup_text))) struct text

/* A number of so many bytes; what is missing is 0. */
static inline uint64_t take_number(struct input *input, size_t bytes)
{
    uint64_t number = 0;

    for (size_t i = 0; i < bytes && input->left; i++, input->at++, input->left--)
        number |= (uint64_t)*input->at << (8 * i);
    return number;
}

/* The input up to a 0 or its end: no text that the targets read has one in it. */
static inline struct text take_text(struct input *input)
{
    size_t size = input->left ? strnlen((const char *)input->at, input->left) : 0;
    struct text text = {malloc(size + 1), size};

    EXPECT(text.bytes);
    if (size)
        memcpy(text.bytes, input->at, size);
    text.bytes[size] = 0;
    input->at += size;
    input->left -= size;
    take_number(input, 1);
    return text;
}

/* A file in memory that has this name in the working directory: its fd, which stays open. */
static inline int make_file(const char *name)
{
    int fd = memfd_create(name, MFD_CLOEXEC);
    char path[64];

    EXPECT(fd >= 0 && snprintf(path, sizeof(path), "/proc/%d/fd/%d", getpid(), fd) > 0);
    unlink(name);
    EXPECT(symlink(path, name) == 0);
    return fd;
}

/* Make a text all that is in a file. */
static inline void fill_file(int fd, struct text text)
{
    EXPECT(ftruncate(fd, 0) == 0);
    EXPECT(pwrite(fd, text.bytes, text.size, 0) == (ssize_t)text.size);
}

/* How many files are open, which is the same before and after what leaks none. */
static inline int open_fds(void)
{
    int count = 0;

    for (int fd = 0; fd < FDS_MAX; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

#endif
