/*
 * mpu-notify-monitor: holds the listeners and has every effect on a caller.
 *
 *     mpu-notify-monitor --listen AGENT --control CONTROL [--kernel RELEASE]
 *     mpu-notify-monitor --supervisor FD [--kernel RELEASE]
 *
 * The first serves the OCI seccomp agent protocol on the socket AGENT, and a supervisor that connects to the socket
 * CONTROL; supervisors may come and go. The second is private to the supervisor that started it, whose socket
 * (SOCK_SEQPACKET) is inherited as FD, and ends with its last listener. Without a supervisor every call is answered
 * with continue. With --kernel it uses no more than a kernel of that release has.
 */
#include "monitor.h"

#include "agent.h"
#include "capabilities.h"
#include "cleanup.h"
#include "packet.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#define PACKET_MAX (sizeof(struct mpu_configure) + MPU_MAX_CONTROLS * sizeof(struct mpu_control))
#define BACKLOG 256

/* What one packet from the supervisor brought. Unclaimed fds are closed by packet_close. */
struct packet {
    size_t size;
    int fds[PACKET_FDS_MAX];
    size_t n_fds;
    bool truncated;
    bool lost_fds; /* there were more than we may have open, or take */
    union {
        struct mpu_header header;
        struct mpu_configure configure;
        uint8_t bytes[PACKET_MAX];
    };
};

static void packet_close(struct packet *packet)
{
    for (size_t i = 0; i < packet->n_fds; i++)
        close(packet->fds[i]);
    packet->n_fds = 0;
}

static void packet_take_fds(struct packet *packet, struct msghdr *message)
{
    for (struct cmsghdr *at = CMSG_FIRSTHDR(message); at; at = CMSG_NXTHDR(message, at)) {
        if (at->cmsg_level != SOL_SOCKET || at->cmsg_type != SCM_RIGHTS)
            continue;
        packet->n_fds = (at->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(packet->fds, CMSG_DATA(at), packet->n_fds * sizeof(int));
    }
}

/* The next packet; -EAGAIN where there is none, -EPIPE at the end of the supervisor. */
static int packet_receive(int socket, struct packet *packet)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(PACKET_FDS_MAX * sizeof(int))];
    struct iovec room = {packet->bytes, sizeof(packet->bytes)};
    struct msghdr message = {
        .msg_iov = &room, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    ssize_t got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);

    packet->n_fds = 0;
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return -EAGAIN;
    if (got <= 0)
        return -EPIPE;
    packet->size = (size_t)got;
    packet->truncated = message.msg_flags & MSG_TRUNC;
    packet->lost_fds = message.msg_flags & MSG_CTRUNC;
    packet_take_fds(packet, &message);
    return 0;
}

void monitor_wake(struct monitor *monitor)
{
    uint64_t one = 1;

    /* The counter cannot overflow before the main thread reads it, and nothing else can go wrong. */
    if (write(monitor->wake, &one, sizeof(one)) < 0)
        return;
}

static bool is_sound(const struct mpu_control *control)
{
    uint64_t count_end = (uint64_t)control->count_at + sizeof(uint32_t);
    uint64_t table_end = (uint64_t)control->table_at + control->table_size;

    return control->size <= MPU_MAX_PARAMS && count_end <= control->size && table_end <= control->size &&
           control->asks <= 1;
}

static int configure(struct monitor *monitor, const struct packet *packet)
{
    const struct mpu_configure *wanted = &packet->configure;
    struct config *config;

    if (packet->size < sizeof(*wanted) || wanted->n_controls > MPU_MAX_CONTROLS || wanted->is_device > 1 ||
        packet->size != sizeof(*wanted) + wanted->n_controls * sizeof(wanted->controls[0]))
        return -EPROTO;
    for (uint32_t i = 0; i < wanted->n_controls; i++)
        if (!is_sound(&wanted->controls[i]))
            return -EPROTO;
    config = calloc(1, sizeof(*config));
    if (!config)
        return -ENOMEM;
    memcpy(config->controls, wanted->controls, wanted->n_controls * sizeof(wanted->controls[0]));
    config->n_controls = wanted->n_controls;
    config->silence_ms = wanted->silence_ms;
    config->device = (struct device){wanted->is_device == 1, wanted->major, wanted->minor, wanted->ino};
    config->older = monitor->config;
    monitor->config = config;
    LOCKED(&monitor->lock);
    monitor->has_supervisor = true;
    return 0;
}

static int say(struct monitor *monitor, struct mpu_header *head, size_t size, const int *fds, size_t n_fds)
{
    struct parcel parcel = {.head = head, .head_size = size, .fds = fds, .n_fds = n_fds};

    return packet_send(monitor->supervisor, &parcel, 0);
}

/* Give the supervisor a fresh channel to a listener. -ETIMEDOUT where it must be tried again later. */
static int announce(struct monitor *monitor, struct listener *listener)
{
    struct mpu_attached attached = {.header = {.type = MPU_ATTACHED, .listener = listener->id}};
    int ends[2], error;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends)) {
        attached.error = errno; /* it is served, with continue */
        error = say(monitor, &attached.header, sizeof(attached), NULL, 0);
        listener->announced = !error;
        return error;
    }
    error = say(monitor, &attached.header, sizeof(attached), (int[]){ends[1], listener->state}, 2);
    /* In place, because its thread may be using it. */
    if (!error && dup3(ends[0], listener->channel, O_CLOEXEC) < 0)
        error = -errno;
    close(ends[0]);
    close(ends[1]);
    listener->announced = !error;
    return error;
}

static int announce_all(struct monitor *monitor)
{
    LOCKED(&monitor->lock);
    int error = 0;

    for (struct listener *at = monitor->listeners; at && !error; at = at->next)
        if (!at->announced)
            error = announce(monitor, at);
    pthread_cond_broadcast(&monitor->told);
    return error;
}

/* From `run`, which has no agent socket. */
static int attach(struct monitor *monitor, struct packet *packet)
{
    struct mpu_attached failed = {.header = {.type = MPU_ATTACHED}};
    struct listener *listener;
    int error;

    if (packet->size != sizeof(struct mpu_attach) || (packet->n_fds != 2 && !packet->lost_fds))
        return -EPROTO;
    if (packet->lost_fds) {
        error = -EMFILE;
    } else if (is_listener(packet->fds[0])) {
        packet->n_fds = 0; /* listener_create owns them now */
        error = listener_create(monitor, packet->fds[0], packet->fds[1], &listener);
        if (!error)
            error = listener_start(listener);
    } else {
        error = -EBADF;
    }
    failed.error = -error;
    return error ? say(monitor, &failed.header, sizeof(failed), NULL, 0) : 0;
}

static int leave(struct monitor *monitor, const struct packet *packet)
{
    if (packet->size != sizeof(struct mpu_leave))
        return -EPROTO;
    monitor->leaving = true;
    return 0;
}

static int dispatch(struct monitor *monitor, struct packet *packet)
{
    bool first = packet->header.type == MPU_CONFIGURE;

    if (packet->truncated || !packet_is_sound(&packet->header, packet->size))
        return -EPROTO;
    if (first == monitor->configured)
        return -EPROTO;
    switch (packet->header.type) {
    case MPU_CONFIGURE:
        monitor->configured = true;
        return configure(monitor, packet);
    case MPU_ATTACH:
        return attach(monitor, packet);
    case MPU_LEAVE:
        return leave(monitor, packet);
    default:
        return -EPROTO;
    }
}

/* Hang up on the supervisor: from now on every call is answered with continue, until another one comes. */
static void lose_supervisor(struct monitor *monitor)
{
    LOCKED(&monitor->lock);

    close(monitor->supervisor);
    monitor->supervisor = -1;
    monitor->configured = false;
    monitor->has_supervisor = false;
    pthread_cond_broadcast(&monitor->told);
    for (struct listener *at = monitor->listeners; at; at = at->next) {
        shutdown(at->channel, SHUT_RDWR);
        at->announced = false;
    }
}

static int greet(struct monitor *monitor, int supervisor)
{
    struct mpu_hello hello = {.header = {.type = MPU_HELLO}};

    monitor->supervisor = supervisor;
    monitor->leaving = false;
    return say(monitor, &hello.header, sizeof(hello), NULL, 0);
}

/* A supervisor that connects takes the place of the one before; the socket's mode says who may. */
static void accept_supervisor(struct monitor *monitor)
{
    int supervisor = accept4(monitor->control, NULL, NULL, SOCK_CLOEXEC);

    if (supervisor < 0)
        return;
    if (monitor->supervisor >= 0)
        lose_supervisor(monitor);
    if (greet(monitor, supervisor))
        lose_supervisor(monitor);
}

static void serve_supervisor(struct monitor *monitor, struct packet *packet)
{
    int error = packet_receive(monitor->supervisor, packet);

    if (error == -EAGAIN)
        return;
    if (!error) {
        error = dispatch(monitor, packet);
        packet_close(packet);
    }
    if (error == -EPROTO)
        complain("the supervisor sent %zu bytes, type %u, which protocol version %d does not have; answering continue "
                 "from now on",
                 packet->size, packet->size < sizeof(packet->header) ? 0 : (unsigned)packet->header.type,
                 MPU_PROTOCOL_VERSION);
    if (error)
        lose_supervisor(monitor);
}

static bool may_end(struct monitor *monitor)
{
    LOCKED(&monitor->lock);

    if (monitor->listeners || monitor->arriving)
        return false;
    return monitor->leaving || (monitor->supervisor < 0 && monitor->control < 0);
}

static void serve(struct monitor *monitor, struct packet *packet)
{
    while (!may_end(monitor)) {
        bool news = monitor->supervisor >= 0 && monitor->configured && announce_all(monitor) == -ETIMEDOUT;
        struct pollfd polled[] = {
            {.fd = monitor->supervisor, .events = (short)(POLLIN | (news ? POLLOUT : 0))},
            {.fd = monitor->control, .events = POLLIN},
            {.fd = agent_is_busy(monitor) ? -1 : monitor->agent, .events = POLLIN},
            {.fd = monitor->wake, .events = POLLIN},
            {.fd = monitor->signals, .events = POLLIN},
        };
        struct signalfd_siginfo came;
        uint64_t count;

        if (poll(polled, sizeof(polled) / sizeof(polled[0]), -1) < 0)
            continue;
        if (polled[3].revents && read(monitor->wake, &count, sizeof(count)) < 0)
            continue;
        if (polled[4].revents && read(monitor->signals, &came, sizeof(came)) > 0)
            monitor->leaving = true;
        if (polled[2].revents)
            agent_accept(monitor);
        if (polled[0].revents)
            serve_supervisor(monitor, packet);
        if (polled[1].revents)
            accept_supervisor(monitor);
    }
}

static int usage(void)
{
    fputs("usage: mpu-notify-monitor --listen AGENT --control CONTROL [--kernel RELEASE]\n"
          "       mpu-notify-monitor --supervisor FD [--kernel RELEASE]\n"
          "Started by mpu-notify. AGENT and CONTROL are paths of sockets; FD is an inherited SOCK_SEQPACKET socket.\n",
          stderr);
    return 2;
}

/* An inherited socket to the supervisor. */
static int parse_socket(const char *text)
{
    char *end;
    long fd;
    int type;
    socklen_t size = sizeof(type);

    errno = 0;
    fd = strtol(text, &end, 10);
    if (errno || *end || end == text || fd < 0 || fd > INT_MAX)
        return -EINVAL;
    if (getsockopt((int)fd, SOL_SOCKET, SO_TYPE, &type, &size) || type != SOCK_SEQPACKET)
        return -EINVAL;
    return (int)fd;
}

/* The command line. */
struct options {
    const char *supervisor;
    const char *listen;
    const char *control;
    const char *kernel;
};

static int parse(int argc, char **argv, struct options *options)
{
    const struct {
        const char *name;
        const char **value;
    } known[] = {
        {"--supervisor", &options->supervisor},
        {"--listen", &options->listen},
        {"--control", &options->control},
        {"--kernel", &options->kernel},
    };

    for (int i = 1; i < argc; i += 2) {
        const char **value = NULL;

        for (size_t k = 0; k < sizeof(known) / sizeof(known[0]); k++)
            if (strcmp(argv[i], known[k].name) == 0)
                value = known[k].value;
        if (!value || i + 1 == argc)
            return -EINVAL;
        *value = argv[i + 1];
    }
    return (options->supervisor != NULL) != (options->listen != NULL) &&
                   (options->listen != NULL) == (options->control != NULL)
               ? 0
               : -EINVAL;
}

/* A socket at a path that only our user may connect to. A file that is there already is replaced. */
static int listen_at(const char *path, int type)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    AUTO_CLOSE fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    mode_t mask = umask(0177);
    int error, result;

    error = fd < 0 ? -errno : strlen(path) >= sizeof(address.sun_path) ? -ENAMETOOLONG : 0;
    if (!error) {
        strcpy(address.sun_path, path);
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

static int open_sockets(struct monitor *monitor, const struct options *options)
{
    if (!options->listen) {
        int supervisor = parse_socket(options->supervisor);

        return supervisor < 0 ? supervisor : greet(monitor, supervisor);
    }
    monitor->control = listen_at(options->control, SOCK_SEQPACKET);
    if (monitor->control < 0)
        return monitor->control;
    monitor->agent = listen_at(options->listen, SOCK_STREAM);
    return monitor->agent < 0 ? monitor->agent : 0;
}

/*
 * Whoever signals all processes of a job does not mean that its programs shall lose the driver. SIGTERM asks to end
 * when there is no listener, which a private monitor does anyway.
 */
static int prepare_signals(void)
{
    static const int ignored[] = {SIGHUP, SIGINT, SIGQUIT, SIGPIPE, SIGALRM, SIGUSR1, SIGUSR2};
    sigset_t term;
    int fd;

    for (size_t i = 0; i < sizeof(ignored) / sizeof(ignored[0]); i++)
        signal(ignored[i], SIG_IGN);
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

static int set_up(struct monitor *monitor, const struct options *options)
{
    struct utsname running;
    int error = mpu_keep_capabilities(MPU_CAPABILITIES_NEEDED);

    if (error) {
        complain("cannot drop capabilities: %s", strerror(-error));
        return error;
    }
    raise_fd_limit();
    monitor->signals = prepare_signals();
    monitor->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    monitor->config = calloc(1, sizeof(struct config)); /* no controls: continue */
    if (!monitor->config || monitor->wake < 0 || monitor->signals < 0 || uname(&running)) {
        complain("cannot start: out of memory or files");
        return -ENOMEM;
    }
    monitor->kernel = kernel_of_release(options->kernel ? options->kernel : running.release);
    return open_sockets(monitor, options);
}

int main(int argc, char **argv)
{
    struct monitor monitor = {.lock = PTHREAD_MUTEX_INITIALIZER,
                              .told = PTHREAD_COND_INITIALIZER,
                              .supervisor = -1,
                              .control = -1,
                              .agent = -1};
    AUTO_FREE struct packet *packet = malloc(sizeof(*packet));
    struct options options = {0};

    if (parse(argc, argv, &options) || (options.supervisor && parse_socket(options.supervisor) < 0))
        return usage();
    if (!packet || set_up(&monitor, &options))
        return 1;
    serve(&monitor, packet);
    if (options.listen) {
        unlink(options.listen);
        unlink(options.control);
    }
    return 0;
}
