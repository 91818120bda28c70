/*
 * Many threads that call without pause.
 *
 *     crowd
 *
 * Each line on standard input is what they call from then on: 0 nothing, 1 an ioctl that is not trapped, 2 an RM
 * control that is not in the control table, 3 one that is. All are made on /dev/null, which refuses them. The answer is
 * how many calls there were since the line before.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define THREADS 1000
#define STACK_BYTES (64 * 1024)
#define RM_CONTROL 0xC020462AUL
#define UNTRAPPED 0x5401UL /* TCGETS */
#define PARAMS_BYTES 3812

struct nvos54 {
    uint32_t client, object, cmd, flags;
    uint64_t params;
    uint32_t size, status;
};

static atomic_int what;
static atomic_ulong calls;
static int file;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static void wait_until_wanted(void)
{
    pthread_mutex_lock(&lock);
    while (what == 0)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

static void *call_without_pause(void *argument)
{
    static uint8_t params[PARAMS_BYTES];
    const uint32_t cmds[] = {0, 0, 0x2080FFF0, 0x2080018D};

    (void)argument;
    for (;;) {
        int now = what;
        struct nvos54 call = {.cmd = cmds[now], .params = (uintptr_t)params, .size = PARAMS_BYTES};

        if (now == 0) {
            wait_until_wanted();
            continue;
        }
        ioctl(file, now == 1 ? UNTRAPPED : RM_CONTROL, &call);
        atomic_fetch_add_explicit(&calls, 1, memory_order_relaxed);
    }
    return NULL;
}

static int start(pthread_attr_t *attributes)
{
    pthread_t thread;

    for (int i = 0; i < THREADS; i++)
        if (pthread_create(&thread, attributes, call_without_pause, NULL)) {
            fprintf(stderr, "crowd: cannot start %d threads\n", THREADS);
            return 1;
        }
    return 0;
}

int main(void)
{
    pthread_attr_t attributes;
    char line[32];

    file = open("/dev/null", O_RDWR);
    setvbuf(stdout, NULL, _IOLBF, 0);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    if (start(&attributes))
        return 1;
    while (fgets(line, sizeof(line), stdin)) {
        pthread_mutex_lock(&lock);
        what = atoi(line) & 3;
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
        printf("%lu\n", atomic_exchange(&calls, 0));
    }
    _exit(0);
}
