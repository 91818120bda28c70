/*
 * Runs a command and appends to a file how many nanoseconds that took: for commands that are shorter than what Python
 * needs to start one, and for hooks, which a runtime starts.
 *
 *     timed FILE COMMAND [ARGUMENT]...
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

int main(int argc, char **argv)
{
    int64_t start = now_ns(), taken;
    int status = 1;
    FILE *file;
    pid_t pid;

    if (argc < 3)
        return 2;
    pid = vfork();
    if (pid == 0) {
        execvp(argv[2], argv + 2);
        _exit(127);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid)
        return 1;
    taken = now_ns() - start;
    file = fopen(argv[1], "a");
    if (!file)
        return 1;
    fprintf(file, "%lld\n", (long long)taken);
    return fclose(file) || status != 0;
}
