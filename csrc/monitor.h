/* The monitor: one supervisor at a time, one thread per listener. */
#ifndef MPU_MONITOR_H
#define MPU_MONITOR_H

#include "caller.h"
#include "protocol.h"
#include "slot.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct packet;
struct seccomp_notif;
struct seccomp_notif_resp;

/* What the supervisor wants. Constant once published, but for its users: the monitor, and listeners until they see
 * that there is a newer one. */
struct config {
    unsigned users; /* guarded by the monitor's lock */
    struct device device;
    uint32_t silence_ms;
    uint32_t n_controls;
    struct mpu_control controls[MPU_MAX_CONTROLS];
};

/* What a listener is known by, in this order wherever they travel. */
enum { FILE_LISTENER, FILE_STATE, FILE_SLOT, LISTENER_FILES };

struct listener {
    struct monitor *monitor;
    struct listener *next;
    uint32_t id;
    int fd;
    int state;      /* memfd with the ContainerProcessState that it came with */
    int slot_fd;    /* memfd of `slot` */
    int channel;    /* our end; -1 at first, hung up on where there is no supervisor or it spoke nonsense */
    int fresh;      /* -1, or the next channel's: of a supervisor that came since; guarded by the monitor's lock */
    bool announced; /* to the supervisor; guarded by the monitor's lock */
    bool running;   /* `thread` is set; guarded by the monitor's lock */
    pthread_t thread;
    atomic_bool receiving; /* the thread is where a signal may interrupt it */
    struct slot *slot;
    struct config *config;       /* NULL before its first call */
    struct seccomp_notif *notif; /* a copy of the slot's */
    size_t notif_size;
    struct seccomp_notif_resp *response;
    size_t response_size;
    uint64_t sequence;
    uint64_t silent_until; /* CLOCK_MONOTONIC, ns: until then the supervisor, which let a call time out, is not asked */
    bool reported[MPU_CAUSES];
    bool size_reported[MPU_MAX_CONTROLS]; /* of MPU_SIZE_UNKNOWN, by the first row of the control */
    uint8_t params[MPU_MAX_PARAMS];
};

struct monitor {
    struct kernel kernel;
    _Atomic(struct config *) config;
    atomic_bool yielding; /* listeners are to be let go, each between two of its calls */

    /* Of the main thread; -1 where there is none. */
    int supervisor;
    int newcomer;    /* who connected last and has not said yet what it is */
    int predecessor; /* a monitor whose place we take */
    int control;     /* where supervisors and successors connect */
    int agent;       /* where runtimes connect: the OCI seccomp agent's socket */
    uint32_t supervisor_pid;
    uint32_t newcomer_pid;
    bool configured; /* the supervisor that is there has said what it wants */
    int unstarted;   /* a connection on `agent` that there was no memory for, to be tried again; -1 for none */
    bool leaving;
    uint64_t paused_until;     /* CLOCK_MONOTONIC, ns: for want of files or memory nothing is accepted or announced */
    uint64_t shortage_said_at; /* CLOCK_MONOTONIC, ns */
    bool is_sole;              /* no other monitor serves the sockets: it has claimed them, or they are nobody else's */
    uint64_t alive_every;      /* ns between two words to the service manager that we are well; 0 for none */
    uint64_t alive_next;       /* CLOCK_MONOTONIC, ns: of the next one */
    bool is_kept;              /* by a service manager, which starts us again with what it keeps for us */

    int wake;    /* an eventfd: there is news for the main thread */
    int signals; /* a signalfd: SIGTERM */

    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t told;  /* a listener was announced, or there is no supervisor any more */
    bool has_supervisor;  /* that has said what it wants */
    int successor;        /* a monitor that takes our place; -1 where there is none */
    struct listener *listeners;
    uint32_t last_id;
    unsigned arriving;   /* connections on the agent socket that are being read */
    uint64_t said_until; /* how far ahead of CLOCK_MONOTONIC, ns, the lines about refused peers are */
    unsigned left_out;   /* such lines since the last that was said */
};

/* Say HELLO to who connected. */
int monitor_greet(const struct monitor *monitor, int newcomer);

/* Put a configuration, which the monitor owns from now on, or NULL, into the place of the one before. */
void config_publish(struct monitor *monitor, struct config *config);

/* The newest configuration, which stays for as long as the listener's thread does not ask again. */
const struct config *config_of(struct listener *listener);

/* One user less; the lock of its monitor is held. */
void config_release(struct config *config);

/* The main thread's life. */
void monitor_serve(struct monitor *monitor, struct packet *packet);

/* Have the main thread look at the listeners. */
void monitor_wake(struct monitor *monitor);

/*
 * A listener and its number, linked into the monitor's, for listener_run to serve. Without a slot it gets a new one.
 * Owns all of the files, on failure too. -EEXIST where the monitor has this listener already.
 */
int listener_create(struct monitor *monitor, const int files[LISTENER_FILES], struct listener **created);

/* Where there is a supervisor, wait until it knows of the listener, so that the first call is translated, too. */
void listener_await_supervisor(struct listener *listener);

/* Serve until the last user of the filter is gone or another monitor does it, then free. */
void *listener_run(void *listener);

/* listener_run in a thread of its own; on failure the listener is freed. */
int listener_start(struct listener *listener);

/* See to the call that was received into listener->notif, up to the reply. */
void call_handle(struct listener *listener);

/* Leave to the driver the call that another monitor received into listener->notif, if it was not answered. */
void call_leave(struct listener *listener);

/* Of a supervisor that has come, take the channel for what is said from now on: it has been silent to nobody. */
void listener_take_channel(struct listener *listener);

/* Send the supervisor a packet on the listener's channel. */
int listener_tell(struct listener *listener, struct mpu_header *head, size_t head_size, uint64_t deadline);

/* Start a detached thread with a small stack. */
int thread_start(void *(*body)(void *), void *argument);

/* Accept one connection on the agent socket and see to it in a thread of its own. Fails where none can be accepted. */
int agent_accept(struct monitor *monitor);

/* Whether more connections than that wait to be read, so that none is to be accepted. */
bool agent_is_busy(struct monitor *monitor);

#endif
