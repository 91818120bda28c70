/*
 * mpu-notify-monitor: holds the listeners and has every effect on a caller.
 *
 *     mpu-notify-monitor --listen AGENT --control CONTROL [--kernel RELEASE]
 *     mpu-notify-monitor --agent-fd FD --control-fd FD [--kernel RELEASE]
 *     mpu-notify-monitor --take-over CONTROL [--kernel RELEASE]
 *     mpu-notify-monitor --supervisor FD [--kernel RELEASE]
 *
 * The first serves the OCI seccomp agent protocol on the socket AGENT, and a supervisor that connects to the socket
 * CONTROL; supervisors may come and go. So does the second, on inherited sockets, and the third, which takes the place
 * of the monitor that serves the socket CONTROL now. They say READY when they accept. The last is private to the
 * supervisor that started it, whose socket (SOCK_SEQPACKET) is inherited as FD, and ends with its last listener.
 * Without a supervisor every call is answered with continue. With --kernel it uses no more than a kernel of that
 * release has.
 */
#include "capabilities.h"
#include "cleanup.h"
#include "confine.h"
#include "handover.h"
#include "keeper.h"
#include "monitor.h"
#include "packet.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#define BACKLOG 256

static int usage(void)
{
    fputs("usage: mpu-notify-monitor --listen AGENT --control CONTROL [--kernel RELEASE]\n"
          "       mpu-notify-monitor --agent-fd FD --control-fd FD [--kernel RELEASE]\n"
          "       mpu-notify-monitor --take-over CONTROL [--kernel RELEASE]\n"
          "       mpu-notify-monitor --supervisor FD [--kernel RELEASE]\n"
          "Started by mpu-notify. AGENT and CONTROL are paths of sockets; each FD is an inherited socket.\n",
          stderr);
    return 2;
}

/* An inherited socket of this type. */
static int parse_socket(const char *text, int wanted)
{
    char *end;
    long fd;
    int type;
    socklen_t size = sizeof(type);

    errno = 0;
    fd = strtol(text, &end, 10);
    if (errno || *end || end == text || fd < 0 || fd > INT_MAX)
        return -EINVAL;
    if (getsockopt((int)fd, SOL_SOCKET, SO_TYPE, &type, &size) || type != wanted)
        return -EINVAL;
    return (int)fd;
}

/* The command line. */
struct options {
    const char *supervisor;
    const char *listen;
    const char *control;
    const char *agent_fd;
    const char *control_fd;
    const char *take_over;
    const char *kernel;
};

/* One way to start, with all that it needs, and its sockets. */
static bool is_sensible(const struct options *options)
{
    int ways = (options->supervisor != NULL) + (options->listen != NULL) + (options->agent_fd != NULL) +
               (options->take_over != NULL);

    if (ways != 1 || !options->listen != !options->control || !options->agent_fd != !options->control_fd)
        return false;
    if (options->supervisor)
        return parse_socket(options->supervisor, SOCK_SEQPACKET) >= 0;
    if (options->agent_fd && options->control_fd)
        return parse_socket(options->agent_fd, SOCK_STREAM) >= 0 &&
               parse_socket(options->control_fd, SOCK_SEQPACKET) >= 0;
    return true;
}

static bool parse(int argc, char **argv, struct options *options)
{
    const struct {
        const char *name;
        const char **value;
    } known[] = {
        {"--supervisor", &options->supervisor}, {"--listen", &options->listen},
        {"--control", &options->control},       {"--agent-fd", &options->agent_fd},
        {"--control-fd", &options->control_fd}, {"--take-over", &options->take_over},
        {"--kernel", &options->kernel},
    };

    for (int i = 1; i < argc; i += 2) {
        const char **value = NULL;

        for (size_t k = 0; k < sizeof(known) / sizeof(known[0]); k++)
            if (strcmp(argv[i], known[k].name) == 0)
                value = known[k].value;
        if (!value || i + 1 == argc)
            return false;
        *value = argv[i + 1];
    }
    return is_sensible(options);
}

/* Whether somebody listens there: a path that a monitor has left behind is free. */
static bool is_served(const struct sockaddr_un *address, int type)
{
    AUTO_CLOSE fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    return connect(fd, (const struct sockaddr *)address, sizeof(*address)) == 0 ||
           (errno != ENOENT && errno != ECONNREFUSED);
}

/* A socket at a path that only our user may connect to. A file that is there, and serves nobody, is replaced. */
static int listen_at(const char *path, int type)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    AUTO_CLOSE fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    mode_t mask = umask(0177);
    int error, result;

    error = fd < 0 ? -errno : strlen(path) >= sizeof(address.sun_path) ? -ENAMETOOLONG : 0;
    if (!error) {
        strcpy(address.sun_path, path);
        error = is_served(&address, type) ? -EADDRINUSE : 0;
    }
    if (!error) {
        unlink(path);
        error = bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, BACKLOG) ? -errno : 0;
    }
    umask(mask);
    if (error) {
        complain("cannot listen on %s: %s", path, strerror(-error));
        return error;
    }
    result = fd;
    fd = -1;
    return result;
}

static int listen_at_both(struct monitor *monitor, const struct options *options)
{
    monitor->control = listen_at(options->control, SOCK_SEQPACKET);
    if (monitor->control < 0)
        return monitor->control;
    monitor->agent = listen_at(options->listen, SOCK_STREAM);
    return monitor->agent < 0 ? monitor->agent : claim(monitor);
}

/* A successor of ours, or a program that we start, must not have them by accident; nor must accept ever wait. */
static int inherit(const char *text, int type)
{
    int fd = parse_socket(text, type);

    fcntl(fd, F_SETFD, FD_CLOEXEC);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    return fd;
}

static int open_sockets(struct monitor *monitor, const struct options *options)
{
    int error;

    if (options->supervisor) {
        monitor->is_sole = true;
        monitor->supervisor = parse_socket(options->supervisor, SOCK_SEQPACKET);
        return monitor_greet(monitor, monitor->supervisor);
    }
    if (options->listen)
        return listen_at_both(monitor, options);
    if (options->take_over) {
        error = take_over(monitor, options->take_over);
        if (error)
            complain("cannot take over from the monitor at %s: %s", options->take_over, strerror(-error));
        return error;
    }
    if (!options->agent_fd || !options->control_fd) /* is_sensible() leaves no other way */
        return -EINVAL;
    monitor->agent = inherit(options->agent_fd, SOCK_STREAM);
    monitor->control = inherit(options->control_fd, SOCK_SEQPACKET);
    error = claim(monitor);
    if (error) {
        complain("another monitor serves these sockets: %s", strerror(-error));
        return error;
    }
    return keeper_restore(monitor);
}

static void say_ready(const struct monitor *monitor)
{
    if (monitor->agent < 0)
        return;
    if (write(STDOUT_FILENO, "READY\n", strlen("READY\n")) < 0)
        complain("cannot say READY: %s", strerror(errno));
    keeper_say_ready();
}

static void remove_socket(int fd)
{
    struct sockaddr_un address = {0};
    socklen_t size = sizeof(address);

    if (getsockname(fd, (struct sockaddr *)&address, &size) == 0 && address.sun_path[0])
        unlink(address.sun_path);
}

static void do_nothing(int number)
{
    (void)number;
}

/*
 * Whoever signals all processes of a job does not mean that its programs shall lose the driver. SIGTERM asks to end
 * when there is no listener, which a private monitor does anyway.
 */
static int prepare_signals(void)
{
    static const int ignored[] = {SIGHUP, SIGINT, SIGQUIT, SIGPIPE, SIGALRM, SIGUSR2};
    const struct sigaction interrupt = {.sa_handler = do_nothing}; /* not SA_RESTART: see hurry() */
    sigset_t term;
    int fd;

    for (size_t i = 0; i < sizeof(ignored) / sizeof(ignored[0]); i++)
        signal(ignored[i], SIG_IGN);
    sigaction(SIGUSR1, &interrupt, NULL);
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    if (sigprocmask(SIG_BLOCK, &term, NULL))
        return -errno;
    fd = signalfd(-1, &term, SFD_CLOEXEC | SFD_NONBLOCK);
    return fd < 0 ? -errno : fd;
}

/* Three fds for each listener and some for each call under way: as many as there may be. */
static void raise_fd_limit(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

/* Waits on it end by CLOCK_MONOTONIC: no change of the machine's time makes them longer. */
static int init_told(pthread_cond_t *told)
{
    pthread_condattr_t attributes;
    int error = pthread_condattr_init(&attributes);

    if (error)
        return -error;
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    error = pthread_cond_init(told, &attributes);
    pthread_condattr_destroy(&attributes);
    return -error;
}

static int set_up(struct monitor *monitor, const struct options *options)
{
    struct utsname running;
    int error = mpu_keep_capabilities(MPU_CAPABILITIES_NEEDED);

    if (!error)
        error = mpu_confine_monitor();
    if (error) {
        complain("cannot give up what it does not need: %s", strerror(-error));
        return error;
    }
    raise_fd_limit();
    monitor->signals = prepare_signals();
    monitor->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    config_publish(monitor, calloc(1, sizeof(struct config))); /* no controls: continue */
    if (init_told(&monitor->told) || !monitor->config || monitor->wake < 0 || monitor->signals < 0 || uname(&running)) {
        complain("cannot start: out of memory or files");
        return -ENOMEM;
    }
    monitor->kernel = kernel_of_release(options->kernel ? options->kernel : running.release);
    return open_sockets(monitor, options);
}

int main(int argc, char **argv)
{
    struct monitor monitor = {.lock = PTHREAD_MUTEX_INITIALIZER,
                              .supervisor = -1,
                              .newcomer = -1,
                              .predecessor = -1,
                              .successor = -1,
                              .control = -1,
                              .unstarted = -1,
                              .agent = -1};
    AUTO_FREE struct packet *packet = malloc(sizeof(*packet));
    struct options options = {0};

    if (!parse(argc, argv, &options))
        return usage();
    monitor.is_kept = options.agent_fd && keeper_is_there();
    monitor.alive_every = monitor.is_kept ? keeper_watches_every() : 0;
    if (!packet || set_up(&monitor, &options)) {
        config_publish(&monitor, NULL);
        return 1;
    }
    say_ready(&monitor);
    monitor_serve(&monitor, packet);
    config_publish(&monitor, NULL);
    if (monitor.agent >= 0 && monitor.is_sole && monitor.successor < 0 && !monitor.is_kept) {
        remove_socket(monitor.agent);
        remove_socket(monitor.control);
    }
    return 0;
}
