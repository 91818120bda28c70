/*
 * mpu-notify-hook: the OCI createRuntime (or prestart) hook. Puts the filter on the init of a container that opted in,
 * while it waits for the runtime, and hands the listener to the agent. Usage is in USAGE below.
 *
 * Whatever fails before the filter is in leaves the container as it was, and --absent says whether it starts. From then
 * on a failure is the hook's, and the runtime gives the container up: without a listener every RM control would fail.
 *
 * no_new_privs is never set. An init that waits for this hook has its root file system still to change, and so has
 * CAP_SYS_ADMIN, with which the kernel asks for no more; and setting it would break setuid programs and file
 * capabilities in the container for good.
 *
 * Error rule: a function that can fail returns 0 or a negative errno; what was attempted is left in struct attempt.
 */
#include "cleanup.h"
#include "inject.h"
#include "json_scan.h"
#include "rm.h"
#include "settings.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <syslog.h>

#define PROGRAM "mpu-notify-hook"
#define DEFAULT_SOCKET "/run/mpu-notify/agent.sock"
#define ANNOTATION "io.mpu-notify.enable"
#define STATE_MAX (1000 * 1024) /* with what is sent around it, no more than the agent takes */
#define CONFIG_MAX (8 * 1024 * 1024)
#define ID_SIZE 1025
#define SOCKET_SIZE 108 /* of sun_path */
#define AGENT_SECONDS 5 /* for the agent to take a connection, and a message */

static const char USAGE[] =
    "usage: " PROGRAM " [--always] [--config FILE] [--listen SOCKET] [--absent start|refuse]\n"
    "       " PROGRAM " --print-filter\n"
    "\n"
    "An OCI createRuntime or prestart hook. Reads the container's state on standard input, puts the filter of\n"
    "mpu-notify on the waiting init of a container with the annotation " ANNOTATION "=\"true\",\n"
    "and hands its listener to the agent. Any other container is left alone.\n"
    "\n"
    "It covers init and all that descends from it. It does NOT cover what is started by `exec` in the container.\n"
    "\n"
    "  --always          any container opted in (for a CDI device, which is asked for by name)\n"
    "  --config FILE     the configuration (default: what " SETTINGS_VARIABLE " names, else\n"
    "                    " SETTINGS_FILE "); its section [agent] has the defaults of\n"
    "  --listen SOCKET   the agent's socket (else " DEFAULT_SOCKET ")\n"
    "  --absent start    where there is no agent, or no filter can be put on init: the container starts without,\n"
    "                    and a warning is written to standard error and to the system's log (else this)\n"
    "  --absent refuse   the container does not start\n"
    "  --print-filter    write the filter, an array of struct sock_filter, to standard output\n"
    "  --help            this text\n";

/* What mpu_notify/notify/filter.py builds; a test compares them. */
static const struct sock_filter FILTER[] = {
#if defined(__x86_64__)
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 6),
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0x40000000 + 514, 7, 0), /* ioctl of x32 */
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 16, 0, 11),              /* of x86-64 */
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1]) + 4),
    BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 3, 8),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_I386, 0, 7),
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 54, 0, 5), /* ioctl of i386 */
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
    BPF_STMT(BPF_ALU | BPF_AND | BPF_K, RM_IOCTL_MASK),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, RM_CONTROL_WANT, 1, 0),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, RM_XFER_WANT, 0, 1),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
#endif
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
};

struct options {
    const char *config;
    const char *listen; /* NULL: as configured */
    const char *absent; /* the same */
    char socket[SOCKET_SIZE];
    bool always;
    bool refuse;
    bool print_filter;
    bool help;
};

struct container {
    struct json state;
    pid_t pid;
    char id[ID_SIZE];
    char bundle[PATH_MAX];
};

/* What is being done, for the message where it fails. */
struct attempt {
    const char *doing;
    const char *object;
    const char *advice;
    bool committed; /* there is no way back but to give the container up */
};

/* All of a file that has no more than `most` bytes; the caller frees the text. */
static int read_all(int fd, size_t most, char **buffer, struct json *text)
{
    size_t size = 0;
    ssize_t got;

    *buffer = malloc(most + 1);
    if (!*buffer)
        return -ENOMEM;
    while (size <= most && (got = read(fd, *buffer + size, most + 1 - size)) != 0) {
        if (got < 0 && errno != EINTR)
            return -errno;
        if (got > 0)
            size += (size_t)got;
    }
    *text = (struct json){*buffer, *buffer + size};
    return size > most ? -EFBIG : 0;
}

/* A container's init is no process that we come from, nor the first of a PID namespace, as in a createContainer hook.
 */
static int parse_pid(struct json value, pid_t *pid)
{
    long number = 0;

    if (!json_next_is(&value, "123456789"))
        return -EINVAL;
    for (const char *at = value.at; at < value.end; at++) {
        if (*at < '0' || *at > '9' || number > INT_MAX / 10 - 1)
            return -EINVAL;
        number = number * 10 + (*at - '0');
    }
    *pid = (pid_t)number;
    return number > 1 && *pid != getpid() && *pid != getppid() ? 0 : -EINVAL;
}

static int parse_annotations(struct json state, bool *enabled)
{
    struct json annotations, value;
    int error = json_find(state, "annotations", &annotations);

    if (!error)
        error = json_find(annotations, ANNOTATION, &value);
    *enabled = !error && json_string_is(value, "true");
    return error == -ENOENT ? 0 : error;
}

/* The id as runtimes let it be, so that it can be quoted in JSON as it is. */
static bool is_plain(const char *id)
{
    return *id && !id[strspn(id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.:@")];
}

static int parse_state(struct container *container)
{
    struct json pid, id, bundle;
    int error = json_find(container->state, "pid", &pid);

    if (!error)
        error = json_find(container->state, "id", &id);
    if (!error)
        error = json_find(container->state, "bundle", &bundle);
    if (!error)
        error = parse_pid(pid, &container->pid);
    if (!error)
        error = json_text(id, container->id, sizeof(container->id));
    if (!error)
        error = json_text(bundle, container->bundle, sizeof(container->bundle));
    if (!error && !is_plain(container->id))
        error = -EINVAL;
    return error == -ENOENT ? -EINVAL : error;
}

static int connect_agent(const char *path, int *agent)
{
    const struct timeval most = {.tv_sec = AGENT_SECONDS};
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    if (strlen(path) >= sizeof(address.sun_path))
        return -ENAMETOOLONG;
    memcpy(address.sun_path, path, strlen(path) + 1);
    *agent = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (*agent < 0 || setsockopt(*agent, SOL_SOCKET, SO_SNDTIMEO, &most, sizeof(most)) ||
        connect(*agent, (struct sockaddr *)&address, sizeof(address)))
        return -errno;
    return 0;
}

/*
 * -EBUSY where the container's own profile brings a listener: the kernel takes only one. Where that is ours already, by
 * another route, the container is `covered`.
 */
static int check_profile(const struct options *options, const struct container *container, struct attempt *attempt,
                         bool *covered)
{
    char path[PATH_MAX + sizeof("/config.json")];
    AUTO_FREE char *buffer = NULL;
    AUTO_CLOSE file = -1;
    struct json value;
    int error;

    *attempt = (struct attempt){"read config.json in", container->bundle, "is it the container's bundle?", false};
    snprintf(path, sizeof(path), "%s/config.json", container->bundle);
    file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return -errno;
    error = read_all(file, CONFIG_MAX, &buffer, &value);
    if (!error)
        error = json_find(value, "linux", &value);
    if (!error)
        error = json_find(value, "seccomp", &value);
    if (!error)
        error = json_find(value, "listenerPath", &value);
    if (error)
        return error == -ENOENT ? 0 : error;
    *attempt =
        (struct attempt){"combine with", "linux.seccomp.listenerPath",
                         "the container's seccomp profile has an agent of its own; use a profile without", false};
    *covered = json_string_is(value, options->listen);
    return *covered || json_string_is(value, "") ? 0 : -EBUSY;
}

static int send_all(int agent, const char *text, size_t size, int fd)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec part = {(void *)(uintptr_t)text, size};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    ssize_t sent;

    *CMSG_FIRSTHDR(&message) =
        (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), &fd, sizeof(int));
    while (part.iov_len) {
        sent = sendmsg(agent, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno != EINTR)
            return -errno;
        if (sent <= 0)
            continue;
        part = (struct iovec){(char *)part.iov_base + sent, part.iov_len - (size_t)sent};
        message.msg_control = NULL; /* the fd went with the first byte */
        message.msg_controllen = 0;
    }
    return 0;
}

/* ContainerProcessState of the OCI runtime specification. */
static int hand_over(int agent, const struct container *container, int listener)
{
    AUTO_FREE char *text = NULL;
    int size = asprintf(
        &text,
        "{\"ociVersion\": \"1.1.0\", \"fds\": [\"seccompFd\"], \"pid\": %d, "
        "\"metadata\": \"{\\\"container\\\": \\\"%s\\\", \\\"route\\\": \\\"hook\\\"}\", \"state\": %.*s}",
        (int)container->pid, container->id, (int)(container->state.end - container->state.at), container->state.at);

    if (size < 0) {
        text = NULL;
        return -ENOMEM;
    }
    return send_all(agent, text, (size_t)size, listener);
}

static int inject(int agent, const struct container *container, struct attempt *attempt)
{
    struct injection injection;
    AUTO_CLOSE listener = -1;
    int error;

    *attempt = (struct attempt){"put the filter on", "the container's init", "is this a createRuntime hook?", false};
    error = inject_filter(container->pid, FILTER, sizeof(FILTER) / sizeof(FILTER[0]), &injection);
    listener = injection.listener;
    attempt->committed = injection.committed;
    if (error)
        return error;
    attempt->doing = "hand the listener of";
    attempt->advice = "is the agent well?";
    return hand_over(agent, container, listener);
}

static int cover(const struct options *options, const struct container *container, struct attempt *attempt)
{
    AUTO_CLOSE agent = -1;
    bool covered = false;
    int error = check_profile(options, container, attempt, &covered);

    if (error || covered)
        return error;
    *attempt = (struct attempt){"connect to the agent at", options->listen,
                                "start `mpu-notify serve`, or name its socket with --listen", false};
    error = connect_agent(options->listen, &agent);
    return error ? error : inject(agent, container, attempt);
}

/* The container's text stays in `buffer`. */
static int hook(const struct options *options, struct container *container, char **buffer, struct attempt *attempt)
{
    bool enabled;
    int error;

    *attempt = (struct attempt){"understand", "the container's state on standard input",
                                "is this a createRuntime or prestart hook?", false};
    error = read_all(STDIN_FILENO, STATE_MAX, buffer, &container->state);
    if (!error)
        error = parse_annotations(container->state, &enabled);
    if (error || !(enabled || options->always))
        return error;
    error = parse_state(container);
    return error ? error : cover(options, container, attempt);
}

static const char *explain(int error)
{
    switch (error) {
    case EBUSY:
        return "a seccomp listener is there already, and the kernel takes only one";
    case ESRCH:
        return "it is gone, or its threads have different seccomp filters";
    case ENOSYS:
        return "not on this machine: Linux 5.7 or later and a 64-bit x86 program are needed";
    case ETIMEDOUT:
        return "it could not be stopped in a system call in time";
    default:
        return strerror(error);
    }
}

static int run(const struct options *options)
{
    AUTO_FREE char *buffer = NULL;
    struct container container = {0};
    struct attempt attempt = {0};
    AUTO_FREE char *message = NULL;
    int error = hook(options, &container, &buffer, &attempt);
    bool refuse = options->refuse || attempt.committed;

    if (!error)
        return 0;
    if (asprintf(&message, "%s%scannot %s %s: %s (%s); the container %s", container.id, *container.id ? ": " : "",
                 attempt.doing, attempt.object, explain(-error), attempt.advice,
                 refuse ? "does not start" : "starts without mpu-notify") < 0)
        message = NULL;
    fprintf(stderr, PROGRAM ": %s\n", message ? message : "out of memory");
    openlog(PROGRAM, LOG_PID, LOG_DAEMON); /* few engines show what a hook says when it succeeds */
    syslog(refuse ? LOG_ERR : LOG_WARNING, "%s", message ? message : "out of memory");
    return refuse ? 1 : 0;
}

static int print_filter(void)
{
    return fwrite(FILTER, sizeof(FILTER), 1, stdout) == 1 && fflush(stdout) == 0 ? 0 : 1;
}

/* What is not on the command line is as configured, and as by default where that says nothing. */
static bool configure(struct options *options)
{
    const char *named = getenv(SETTINGS_VARIABLE);
    AUTO_FREE char *text = settings_text(options->config ? options->config : named && *named ? named : SETTINGS_FILE);
    char absent[16] = "start";

    strcpy(options->socket, DEFAULT_SOCKET);
    if (text) {
        settings_find(text, "agent", "socket", options->socket, sizeof(options->socket));
        settings_find(text, "agent", "absent", absent, sizeof(absent));
    }
    options->listen = options->listen ? options->listen : options->socket;
    options->refuse = strcmp(options->absent ? options->absent : absent, "refuse") == 0;
    return !options->absent || options->refuse || strcmp(options->absent, "start") == 0;
}

static bool parse(int argc, char **argv, struct options *options)
{
    static const struct option KNOWN[] = {
        {"always", no_argument, NULL, 'y'},
        {"listen", required_argument, NULL, 'l'},
        {"absent", required_argument, NULL, 'a'},
        {"print-filter", no_argument, NULL, 'p'},
        {"config", required_argument, NULL, 'c'},
        {"help", no_argument, NULL, 'h'},
        {0},
    };
    int option;
    bool good = true;

    while ((option = getopt_long(argc, argv, "h", KNOWN, NULL)) != -1) {
        options->always |= option == 'y';
        options->print_filter |= option == 'p';
        options->help |= option == 'h';
        if (option == 'l')
            options->listen = optarg;
        else if (option == 'a')
            options->absent = optarg;
        else if (option == 'c')
            options->config = optarg;
        good &= option != '?';
    }
    return good && optind == argc && configure(options);
}

int main(int argc, char **argv)
{
    struct options options = {0};

    if (!parse(argc, argv, &options)) {
        fputs(USAGE, stderr);
        return 2;
    }
    if (options.help)
        return fputs(USAGE, stdout) < 0;
    return options.print_filter ? print_filter() : run(&options);
}
