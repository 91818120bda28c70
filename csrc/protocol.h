/*
 * The protocol between monitor and supervisor.
 *
 * They share one unix SOCK_SEQPACKET socket, and one more for each listener, its channel, so that no container waits
 * for another's calls. A packet is one of the structs below; it begins with mpu_header, whose length is the length of
 * the packet and whose version is MPU_PROTOCOL_VERSION. A packet of another version, of a length that its type does not
 * have, or of a type that the receiver does not take there is a protocol error: the receiver says so and hangs up, and
 * from then on the monitor answers every call with continue. Integers have the machine's byte order; both ends always
 * run on one machine.
 *
 *   monitor                                     supervisor
 *   HELLO [+ agent, control]              -->                              the sockets, where it has any
 *                                         <--   CONFIGURE                  first, and for another driver again
 *                                         <--   ATTACH + listener, state   of `run`: others come by the agent socket
 *                                         <--   ADOPT + listener, state, slot   of a monitor that is gone
 *   ATTACHED + channel, listener, state, slot   -->                        once a listener and supervisor
 *   REPLACED                              -->                              last: another supervisor is there
 *   MOVED                                 -->                              last: another monitor is there
 *                                         <--   LEAVE                      end when there is no listener
 *
 *   on a channel, for each call that is in the table
 *   BEGUN                                 -->
 *   TRANSLATE_IN, params as read          -->                              only where the control asks about PIDs
 *                                         <--   ANSWER, params to perform
 *   TRANSLATE_OUT, params as performed    -->                              not for an answer without PIDs
 *                                         <--   ANSWER, params to write
 *                                         or    ANSWER, one more control   in the place of any answer
 *   PERFORMED, its params as performed    -->                              then another answer
 *   OUTCOME                               -->
 *
 *   ENDED                                 -->                              last
 *
 * BEGUN wants no answer: it lets the supervisor get ready while the monitor looks at the caller. An ANSWER belongs to
 * the request whose sequence it repeats; one that comes too late is dropped. With the verdict PERFORM it asks for one
 * more control of the table to be performed on the same object, before it answers for good: at most MPU_MAX_PERFORMED
 * times in a call, and nothing of that reaches the caller. Where a control's table is behind a pointer, "params" in a
 * request and its answer are the params and then that table. Fds travel by SCM_RIGHTS, in the order
 * given; a state is a memfd with the OCI ContainerProcessState that came with the listener, which is the supervisor's
 * to read. A supervisor that connects takes the place of the one before, and is told of every listener that there is.
 *
 * Either of the two may end at any moment. A supervisor keeps each listener, its state and its slot (slot.h), and has a
 * new monitor adopt them when the old one is gone; one that the monitor has already is left as it is. A new monitor can
 * also take a living one's place, by the control socket; the supervisor then connects to the new one:
 *
 *   old monitor                                 new monitor
 *   HELLO + agent, control                -->
 *                                         <--   TAKE_OVER
 *   ADOPT + listener, state, slot         -->                              of each, between two of its calls
 *
 * The old one holds the lock of the sockets until it has ended. A new one that it gave up meanwhile, because it had
 * been stopped, finds the lock held when it wakes up, and gives back what it has got, and what came since:
 *
 *   monitor with the lock                       monitor without
 *   HELLO + agent, control                -->
 *                                         <--   GIVE_BACK
 *                                         <--   ADOPT + listener, state, slot
 *
 * HELLO, TAKE_OVER, GIVE_BACK and ADOPT are the same in every version, so that each version can take another's place.
 *
 * This header is also what cffi reads for the Python side: only integers, structs, enums and plain defines.
 */
#ifndef MPU_PROTOCOL_H
#define MPU_PROTOCOL_H

#include <stdint.h>

#define MPU_PROTOCOL_VERSION 3
#define MPU_MAX_PARAMS 65536 /* bytes of params in a packet; the largest control known has 55888 */
#define MPU_MAX_PERFORMED 8  /* more controls in one call; a full list of processes needs 6 */
#define MPU_MAX_CONTROLS 256
#define MPU_CAUSES 16 /* also in a slot: the same in every version */

enum mpu_type {
    MPU_HELLO = 1,
    MPU_CONFIGURE = 2,
    MPU_ATTACH = 3,
    MPU_ATTACHED = 4,
    MPU_BEGUN = 5,
    MPU_TRANSLATE_IN = 6,
    MPU_TRANSLATE_OUT = 7,
    MPU_ANSWER = 8,
    MPU_OUTCOME = 9,
    MPU_ENDED = 10,
    MPU_LEAVE = 11,
    MPU_ADOPT = 12,
    MPU_TAKE_OVER = 13,
    MPU_REPLACED = 14,
    MPU_MOVED = 15,
    MPU_GIVE_BACK = 16,
    MPU_PERFORMED = 20,
};

/* What became of a call in the table: translated, or the cause for which it was answered with continue. */
enum mpu_cause {
    MPU_TRANSLATED = 0,
    MPU_CALLER_GONE = 1,          /* the notification id became invalid: the caller died or was interrupted */
    MPU_MEMORY_UNREADABLE = 2,    /* NVOS54 or params could not be read */
    MPU_MEMORY_UNWRITABLE = 3,    /* NVOS54 or params could not be written */
    MPU_SIZE_UNKNOWN = 4,         /* a control in the table with a params size that is not */
    MPU_FLAGS_SET = 5,            /* NVOS54.flags was not 0 */
    MPU_FILE_UNAVAILABLE = 6,     /* the caller's file could not be looked at or fetched */
    MPU_FILE_FOREIGN = 7,         /* the caller's file is not the control node */
    MPU_IOCTL_FAILED = 8,         /* the ioctl itself failed, error has its errno */
    MPU_STATUS_BAD = 9,           /* the driver answered with an RM status but 0, error has it */
    MPU_SUPERVISOR_GONE = 10,     /* no supervisor */
    MPU_SUPERVISOR_SILENT = 11,   /* no answer in time */
    MPU_SUPERVISOR_DECLINED = 12, /* the supervisor answered continue */
    MPU_REPLY_FAILED = 13,        /* the answer was written but the kernel did not take the reply */
    MPU_TABLE_UNUSUAL = 14,       /* the table behind a pointer has not the size that the control's table says */
};

enum mpu_verdict {
    MPU_CONTINUE = 0,
    MPU_PROCEED = 1,
    MPU_PERFORM = 2,
};

struct mpu_header {
    uint32_t length; /* of the whole packet, bytes */
    uint16_t version;
    uint16_t type;
    uint32_t listener; /* chosen by the monitor, never used twice; 0 where none is meant */
    uint32_t reserved; /* 0 */
};

struct mpu_hello {
    struct mpu_header header;
    uint32_t pid;
    uint32_t is_kept;    /* 1: a service manager starts it again, nobody else need */
    uint32_t supervisor; /* pid of the one that is there, 0 where there is none */
    uint32_t reserved;
};

struct mpu_control {
    uint32_t cmd;
    uint32_t size; /* of the params, bytes */
    uint32_t asks; /* 1: the caller asks about PIDs, so the params are translated in, too */
    /*
     * Where in the params the u32 count of PIDs and their table are, bytes: an answer without PIDs needs nobody.
     * table_size 0: there is no count, every answer has PIDs.
     */
    uint32_t count_at;
    uint32_t table_at;
    uint32_t table_size;
    /*
     * Where in the params the u64 pointer to a table is, that table's entry size in bytes and how many entries the
     * caller must have room for; it says so at count_at. With a null pointer and count 0 it asks for the count alone,
     * and the driver for it with a table of ours. entry_size 0: there is no pointer.
     */
    uint32_t pointer_at;
    uint32_t entry_size;
    uint32_t n_entries;
};

/* The control table, the control node and how long the supervisor may be silent during one call. */
struct mpu_configure {
    struct mpu_header header;
    uint32_t silence_ms;
    uint32_t is_device; /* 1: major and minor are st_rdev of a character device; 0: of st_dev, and ino counts */
    uint32_t major;
    uint32_t minor;
    uint64_t ino;
    uint32_t n_controls;
    uint32_t reserved; /* 0 */
    struct mpu_control controls[];
};

struct mpu_attach {
    struct mpu_header header;
};

struct mpu_leave {
    struct mpu_header header;
};

struct mpu_adopt {
    struct mpu_header header;
};

struct mpu_take_over {
    struct mpu_header header;
};

struct mpu_give_back {
    struct mpu_header header;
};

struct mpu_moved {
    struct mpu_header header;
};

struct mpu_replaced {
    struct mpu_header header;
};

struct mpu_attached {
    struct mpu_header header;
    uint64_t identity; /* of the listener, whichever monitor serves it */
    int32_t error;     /* of an ATTACH or ADOPT: 0, or its errno, and then there are no fds */
    uint32_t reserved;
};

struct mpu_begun {
    struct mpu_header header;
    uint32_t tid; /* of the caller, in the initial PID namespace */
    uint32_t reserved;
};

/* TRANSLATE_IN and TRANSLATE_OUT. */
struct mpu_call {
    struct mpu_header header;
    uint64_t sequence; /* of this request, never used twice */
    uint64_t begun_ns; /* CLOCK_BOOTTIME just before the ioctl; 0 in TRANSLATE_IN */
    uint32_t cmd;
    uint32_t size; /* of the params that follow, bytes */
    uint8_t params[];
};

struct mpu_answer {
    struct mpu_header header;
    uint64_t sequence;
    uint32_t verdict; /* enum mpu_verdict */
    uint32_t size;    /* of the params that follow, bytes; 0 where the verdict is continue */
    uint32_t cmd;     /* of the control to perform, which has no pointer; 0 where the verdict is another */
    uint32_t reserved;
    uint8_t params[];
};

struct mpu_performed {
    struct mpu_header header;
    uint64_t sequence; /* as of a request */
    uint64_t begun_ns; /* CLOCK_BOOTTIME just before the ioctl */
    uint32_t cmd;
    uint32_t status; /* RM status; the params are as they were where it is not 0 */
    uint32_t size;   /* of the params that follow, bytes */
    uint32_t reserved;
    uint8_t params[];
};

/* After every call that the supervisor was asked about, and after the first of each other cause of a listener. */
struct mpu_outcome {
    struct mpu_header header;
    uint64_t duration_ns; /* from receipt to reply */
    uint32_t tid;
    uint32_t cmd;
    uint32_t size;
    uint32_t cause; /* enum mpu_cause */
    int32_t error;  /* errno or RM status that belongs to the cause, 0 where there is none */
    uint32_t reserved;
};

struct mpu_counts {
    uint64_t received;           /* notifications */
    uint64_t untranslated;       /* of these, not in the table */
    uint64_t causes[MPU_CAUSES]; /* of these, by enum mpu_cause */
};

struct mpu_ended {
    struct mpu_header header;
    struct mpu_counts counts;
};

#endif
