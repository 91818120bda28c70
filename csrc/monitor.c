/* The monitor's main thread: supervisors and successors come and go, and with them listeners. */
#include "monitor.h"

#include "agent.h"
#include "cleanup.h"
#include "handover.h"
#include "keeper.h"
#include "packet.h"
#include "peer.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define PAUSE_MS 100            /* before trying again what there were no files or no memory for */
#define SHORTAGE_EVERY_MS 60000 /* it is said */
#define HURRY_MS 10             /* between two reminders to threads that are to let go of their listeners */
#define RETIRE_MS 2000          /* for calls under way to end, where the service manager ends us */

void monitor_wake(struct monitor *monitor)
{
    uint64_t one = 1;

    /* The counter cannot overflow before the main thread reads it, and nothing else can go wrong. */
    if (write(monitor->wake, &one, sizeof(one)) < 0)
        return;
}

static bool is_sound(const struct mpu_control *control)
{
    uint64_t whole = control->size + (uint64_t)control->entry_size * control->n_entries;
    uint64_t count_end = (uint64_t)control->count_at + sizeof(uint32_t);
    uint64_t table_end = (uint64_t)control->table_at + control->table_size;
    uint64_t pointer_end = (uint64_t)control->pointer_at + (control->entry_size ? sizeof(uint64_t) : 0);

    return whole <= MPU_MAX_PARAMS && count_end <= control->size && table_end <= whole &&
           pointer_end <= control->size && control->asks <= 1;
}

void config_release(struct config *config)
{
    if (config && --config->users == 0)
        free(config);
}

void config_publish(struct monitor *monitor, struct config *config)
{
    LOCKED(&monitor->lock);

    config_release(monitor->config);
    if (config)
        config->users = 1;
    monitor->config = config;
}

const struct config *config_of(struct listener *listener)
{
    struct monitor *monitor = listener->monitor;

    if (listener->config != monitor->config) {
        LOCKED(&monitor->lock);
        config_release(listener->config);
        listener->config = monitor->config;
        listener->config->users++;
    }
    return listener->config;
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
    config_publish(monitor, config);
    LOCKED(&monitor->lock);
    monitor->has_supervisor = true;
    return 0;
}

static int say(struct monitor *monitor, struct mpu_header *head, size_t size, const int *fds, size_t n_fds)
{
    struct parcel parcel = {.head = head, .head_size = size, .fds = fds, .n_fds = n_fds};

    return packet_send(monitor->supervisor, &parcel, 0);
}

static int announce_with_files(struct monitor *monitor, struct listener *listener, struct mpu_attached *attached)
{
    int ends[2], error;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
        return -errno; /* until then it is served, with continue */
    /* First, because a call may come as soon as the supervisor knows. */
    if (listener->fresh >= 0)
        close(listener->fresh);
    listener->fresh = ends[0];
    error = say(monitor, &attached->header, sizeof(*attached),
                (int[]){ends[1], listener->fd, listener->state, listener->slot_fd}, 1 + LISTENER_FILES);
    close(ends[1]);
    return error;
}

/* Give the supervisor a fresh channel to a listener. -ETIMEDOUT, or a shortage, where it must be tried again later. */
static int announce(struct monitor *monitor, struct listener *listener)
{
    struct mpu_attached attached = {.header = {.type = MPU_ATTACHED, .listener = listener->id},
                                    .identity = listener->slot->identity};
    int error = announce_with_files(monitor, listener, &attached);

    /* `run` waits for it, and says what there is too little of. */
    if (is_shortage(error) && monitor->control < 0) {
        attached.error = -error;
        error = say(monitor, &attached.header, sizeof(attached), NULL, 0);
    }
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

static int attach_listener(struct monitor *monitor, struct packet *packet)
{
    const int files[LISTENER_FILES] = {packet->fds[0], packet->fds[1], -1};
    struct listener *listener;
    int error;

    if (packet->n_fds != 2)
        return packet->lost_fds ? -EMFILE : -EPROTO;
    if (!is_listener(packet->fds[0]))
        return -EBADF;
    packet->n_fds = 0; /* listener_create owns them now */
    error = listener_create(monitor, files, &listener);
    return error ? error : listener_start(listener);
}

/* ATTACH is from `run`, which has no agent socket. */
static int take_listener(struct monitor *monitor, struct packet *packet)
{
    struct mpu_attached failed = {.header = {.type = MPU_ATTACHED}};
    int error;

    if (packet->size != sizeof(packet->header))
        return -EPROTO;
    error = packet->header.type == MPU_ADOPT ? adopt(monitor, packet) : attach_listener(monitor, packet);
    if (error == 0 || error == -EPROTO)
        return error;
    failed.error = -error;
    return say(monitor, &failed.header, sizeof(failed), NULL, 0);
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
    if (packet->truncated || !packet_is_sound(&packet->header, packet->size))
        return -EPROTO;
    if (!monitor->configured && packet->header.type != MPU_CONFIGURE)
        return -EPROTO;
    switch (packet->header.type) {
    case MPU_CONFIGURE:
        monitor->configured = true;
        return configure(monitor, packet);
    case MPU_ATTACH:
    case MPU_ADOPT:
        return take_listener(monitor, packet);
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
    monitor->supervisor_pid = 0;
    monitor->configured = false;
    monitor->has_supervisor = false;
    pthread_cond_broadcast(&monitor->told);
    for (struct listener *at = monitor->listeners; at; at = at->next) {
        shutdown(at->channel, SHUT_RDWR);
        if (at->fresh >= 0)
            shutdown(at->fresh, SHUT_RDWR);
        at->announced = false;
    }
}

int monitor_greet(const struct monitor *monitor, int newcomer)
{
    struct mpu_hello hello = {.header = {.type = MPU_HELLO},
                              .pid = (uint32_t)getpid(),
                              .is_kept = monitor->is_kept,
                              .supervisor = monitor->supervisor_pid};
    const int sockets[] = {monitor->agent, monitor->control};
    struct parcel parcel = {.head = &hello.header, .head_size = sizeof(hello), .fds = sockets};

    parcel.n_fds = monitor->agent < 0 ? 0 : 2;
    return packet_send(newcomer, &parcel, 0);
}

static void drop_newcomer(struct monitor *monitor)
{
    if (monitor->newcomer >= 0)
        close(monitor->newcomer);
    monitor->newcomer = -1;
}

/* Who connects says next what it is. The last one counts. */
static int accept_newcomer(struct monitor *monitor)
{
    int newcomer = accept4(monitor->control, NULL, NULL, SOCK_CLOEXEC);
    struct ucred peer = {0};

    if (newcomer < 0)
        return -errno;
    if (peer_check(newcomer, false, &peer)) {
        peer_complain(monitor, &peer, "control", PEER_REFUSED);
        peer_hang_up(newcomer);
        return 0;
    }
    drop_newcomer(monitor);
    monitor->newcomer = newcomer;
    monitor->newcomer_pid = (uint32_t)peer.pid;
    if (monitor_greet(monitor, newcomer))
        drop_newcomer(monitor);
    return 0;
}

/* A supervisor that connects takes the place of the one before. */
static void replace_supervisor(struct monitor *monitor, int supervisor)
{
    struct mpu_replaced replaced = {.header = {.type = MPU_REPLACED}};

    if (monitor->supervisor >= 0) {
        say(monitor, &replaced.header, sizeof(replaced), NULL, 0); /* lost where it does not read: it will see */
        lose_supervisor(monitor);
    }
    monitor->supervisor = supervisor;
    monitor->supervisor_pid = monitor->newcomer_pid;
    monitor->leaving = false;
}

static void complain_of_nonsense(const char *whose, const struct packet *packet, const char *so)
{
    complain("%s sent %zu bytes, type %u, which protocol version %d does not have; %s", whose, packet->size,
             packet->size < sizeof(packet->header) ? 0 : (unsigned)packet->header.type, MPU_PROTOCOL_VERSION, so);
}

/* Another monitor takes our place; the supervisor goes to that one. */
static void make_room(struct monitor *monitor, int successor)
{
    struct mpu_moved moved = {.header = {.type = MPU_MOVED}};

    if (monitor->supervisor >= 0) {
        say(monitor, &moved.header, sizeof(moved), NULL, 0);
        lose_supervisor(monitor);
    }
    hand_over(monitor, successor);
}

static void serve_newcomer(struct monitor *monitor, struct packet *packet)
{
    int newcomer = monitor->newcomer;
    int error = packet_receive(newcomer, packet);

    if (error == -EAGAIN)
        return;
    if (!error && packet_is_stable(packet, MPU_TAKE_OVER, sizeof(struct mpu_take_over))) {
        monitor->newcomer = -1;
        make_room(monitor, newcomer);
    } else if (!error && packet_is_stable(packet, MPU_GIVE_BACK, sizeof(struct mpu_give_back))) {
        if (monitor->predecessor < 0) {
            monitor->newcomer = -1;
            monitor->predecessor = newcomer;
        } else {
            drop_newcomer(monitor); /* it comes again */
        }
    } else if (!error && !packet->truncated && packet_is_sound(&packet->header, packet->size) &&
               packet->header.type == MPU_CONFIGURE) {
        monitor->newcomer = -1;
        replace_supervisor(monitor, newcomer);
        if (dispatch(monitor, packet))
            lose_supervisor(monitor);
    } else {
        if (!error)
            complain_of_nonsense("who connected", packet, "hanging up");
        drop_newcomer(monitor);
    }
    if (!error)
        packet_close(packet);
}

/* One that was told to end says LEAVE before, and one that is replaced, or goes to another monitor, knows of it. */
static void complain_of_end(struct monitor *monitor)
{
    LOCKED(&monitor->lock);

    if (monitor->listeners && !monitor->leaving)
        complain("the supervisor has ended: calls go to the driver untranslated%s",
                 monitor->control < 0 ? "" : " until there is another");
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
        complain_of_nonsense("the supervisor", packet, "answering continue from now on");
    if (error == -EPIPE)
        complain_of_end(monitor);
    if (error)
        lose_supervisor(monitor);
}

static void serve_predecessor(struct monitor *monitor, struct packet *packet)
{
    int error = packet_receive(monitor->predecessor, packet);

    if (error == -EAGAIN)
        return;
    if (!error) {
        error = packet_is_stable(packet, MPU_ADOPT, sizeof(struct mpu_adopt)) ? adopt(monitor, packet) : -EPROTO;
        packet_close(packet);
        if (error)
            complain("cannot take a listener over: %s; it is left to the supervisor", strerror(-error));
        return;
    }
    close(monitor->predecessor);
    monitor->predecessor = -1;
}

/*
 * One whose place we took may live on without us, having given us up while we were stopped: then it has the lock, and
 * gets what we have. We have it where that one has ended.
 */
static void settle(struct monitor *monitor)
{
    int other;

    if (claim(monitor) == 0)
        return;
    other = connect_to_sole(monitor);
    if (other >= 0)
        make_room(monitor, other);
}

static bool is_settled(const struct monitor *monitor)
{
    return monitor->is_sole || monitor->predecessor >= 0 || monitor->successor >= 0;
}

static bool may_end(struct monitor *monitor)
{
    LOCKED(&monitor->lock);

    if (monitor->listeners || monitor->arriving || monitor->unstarted >= 0 || monitor->predecessor >= 0)
        return false;
    if (monitor->successor >= 0)
        return true;
    return monitor->leaving || (monitor->supervisor < 0 && monitor->control < 0);
}

/* The service manager starts us again, and keeps the listeners meanwhile: let them go as soon as it can be. */
static void take_signal(struct monitor *monitor, uint64_t *end_by)
{
    struct signalfd_siginfo came;

    if (read(monitor->signals, &came, sizeof(came)) <= 0)
        return;
    monitor->leaving = true;
    if (monitor->is_kept) {
        monitor->yielding = true;
        *end_by = now_ns(CLOCK_MONOTONIC) + RETIRE_MS * NS_PER_MS;
    }
}

/* What there are no files or no memory for stays there, and would wake us again at once: try it again after a while. */
static void heed_shortage(struct monitor *monitor, int error)
{
    uint64_t now = now_ns(CLOCK_MONOTONIC);

    if (!is_shortage(error))
        return;
    if (!monitor->shortage_said_at || now - monitor->shortage_said_at > SHORTAGE_EVERY_MS * NS_PER_MS) {
        complain("a container or a supervisor has to wait: %s; trying on", strerror(-error));
        monitor->shortage_said_at = now;
    }
    monitor->paused_until = now + PAUSE_MS * NS_PER_MS;
}

/* How long to wait for events at most, in ms: -1 for good. */
static int patience(struct monitor *monitor, bool paused)
{
    if (!paused && monitor->unstarted >= 0)
        return 0;
    if (monitor->yielding || !is_settled(monitor))
        return HURRY_MS;
    if (paused)
        return PAUSE_MS;
    return monitor->alive_every ? ms_until(monitor->alive_next) : -1;
}

/* A service manager learns by this that we were killed and cannot end, and starts another. */
static void say_alive(struct monitor *monitor)
{
    uint64_t now = now_ns(CLOCK_MONOTONIC);

    if (!monitor->alive_every || now < monitor->alive_next)
        return;
    keeper_say_alive();
    monitor->alive_next = now + monitor->alive_every;
}

void monitor_serve(struct monitor *monitor, struct packet *packet)
{
    uint64_t end_by = UINT64_MAX;

    while (!may_end(monitor) && now_ns(CLOCK_MONOTONIC) < end_by) {
        bool paused = now_ns(CLOCK_MONOTONIC) < monitor->paused_until;
        int announced = monitor->supervisor >= 0 && monitor->configured && !paused ? announce_all(monitor) : 0;
        bool news = announced == -ETIMEDOUT;
        bool accepts = monitor->successor < 0 && is_settled(monitor) && !paused;
        struct pollfd polled[] = {
            {.fd = monitor->supervisor, .events = (short)(POLLIN | (news ? POLLOUT : 0))},
            {.fd = accepts ? monitor->control : -1, .events = POLLIN},
            {.fd = !accepts || agent_is_busy(monitor) ? -1 : monitor->agent, .events = POLLIN},
            {.fd = monitor->wake, .events = POLLIN},
            {.fd = monitor->signals, .events = POLLIN},
            {.fd = monitor->newcomer, .events = POLLIN},
            {.fd = monitor->predecessor, .events = POLLIN},
            {.fd = monitor->successor, .events = POLLIN},
        };
        uint64_t count;

        if (monitor->yielding)
            hurry(monitor);
        say_alive(monitor);
        heed_shortage(monitor, announced);
        if (poll(polled, sizeof(polled) / sizeof(polled[0]), patience(monitor, paused || is_shortage(announced))) < 0)
            continue;
        if (polled[3].revents && read(monitor->wake, &count, sizeof(count)) < 0)
            continue;
        if (polled[4].revents)
            take_signal(monitor, &end_by);
        if (polled[2].revents || (!paused && monitor->unstarted >= 0))
            heed_shortage(monitor, agent_accept(monitor));
        if (polled[0].revents)
            serve_supervisor(monitor, packet);
        if (polled[6].revents)
            serve_predecessor(monitor, packet);
        if (polled[7].revents) /* it has nothing to say */
            lose_successor(monitor);
        if (polled[5].revents)
            serve_newcomer(monitor, packet);
        if (polled[1].revents)
            heed_shortage(monitor, accept_newcomer(monitor));
        if (!is_settled(monitor))
            settle(monitor);
    }
}
