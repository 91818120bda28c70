/*
 * Times RM controls that are in no control table, on the cheapest file that refuses them.
 *
 *     calls
 *
 * Each line on standard input is a number of calls to make; the answer is a line with the nanoseconds per call.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

#define RM_CONTROL 0xC020462AUL
#define UNKNOWN_CMD 0x2080FFF0u

struct nvos54 {
    uint32_t client, object, cmd, flags;
    uint64_t params;
    uint32_t size, status;
};

static double now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

int main(void)
{
    struct nvos54 call = {.cmd = UNKNOWN_CMD, .size = sizeof(call)};
    int file = open("/dev/null", O_RDWR);
    char line[32];

    setvbuf(stdout, NULL, _IOLBF, 0);
    while (fgets(line, sizeof(line), stdin)) {
        long count = atol(line);
        double start = now_ns();

        for (long i = 0; i < count; i++)
            if (ioctl(file, RM_CONTROL, &call) != -1 || errno != ENOTTY) {
                fprintf(stderr, "calls: an RM control on /dev/null: expected ENOTTY, got %s\n", strerror(errno));
                return 1;
            }
        printf("%.1f\n", (now_ns() - start) / (double)count);
    }
    return 0;
}
