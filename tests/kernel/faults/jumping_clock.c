/* Preloaded: the machine's time jumps by a year, back and forth, each time that somebody looks. */
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define YEAR_SECONDS (365 * 24 * 60 * 60)

static time_t jump(void)
{
    static unsigned looks;

    return __atomic_fetch_add(&looks, 1, __ATOMIC_RELAXED) % 2 ? YEAR_SECONDS : -YEAR_SECONDS;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = (int)syscall(SYS_clock_gettime, clock, now);

    if (result == 0 && clock == CLOCK_REALTIME)
        now->tv_sec += jump();
    return result;
}

time_t time(time_t *now)
{
    struct timespec found;

    clock_gettime(CLOCK_REALTIME, &found);
    if (now)
        *now = found.tv_sec;
    return found.tv_sec;
}
