#include "caller.h"

#include "cleanup.h"
#include "packet.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/audit.h>
#include <linux/kcmp.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define X32_SYSCALL_BIT 0x40000000 /* asm/unistd.h, x86 */
#define PIDFD_THREAD_FLAG O_EXCL   /* linux/pidfd.h, Linux 6.9 */
#define PROC_PATH_MAX 64

#if defined(__x86_64__)
#define NATIVE_ARCH AUDIT_ARCH_X86_64
#define COMPAT_ARCH AUDIT_ARCH_I386
#elif defined(__aarch64__)
#define NATIVE_ARCH AUDIT_ARCH_AARCH64
#define COMPAT_ARCH AUDIT_ARCH_ARM
#else
#error "mpu-notify knows x86-64 and aarch64"
#endif

static int pidfd_open(pid_t pid, unsigned flags)
{
    int fd = (int)syscall(SYS_pidfd_open, pid, flags);

    return fd < 0 ? -errno : fd;
}

struct kernel kernel_of_release(const char *release)
{
    int major = 0, minor = 0, version;

    sscanf(release, "%3d.%3d", &major, &minor);
    version = major * 1000 + minor;
    return (struct kernel){
        .pidfd_thread = version >= 6009, .receive_ends = version >= 6011, .map_query = version >= 6011};
}

bool caller_is_compat(uint32_t arch)
{
    return arch == COMPAT_ARCH;
}

bool caller_abi_is_known(const struct seccomp_notif *notif)
{
    if (caller_is_compat(notif->data.arch))
        return true;
    return notif->data.arch == NATIVE_ARCH && !(notif->data.nr & X32_SYSCALL_BIT);
}

bool caller_is_waiting(int listener, uint64_t id)
{
    int result;

    do /* a freezer or a stop may interrupt the wait for the kernel's lock */
        result = ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &id);
    while (result && errno == EINTR);
    return result == 0;
}

int caller_glance(pid_t tid, uint64_t address, void *buffer, size_t size)
{
    struct iovec local = {buffer, size};
    struct iovec remote = {(void *)(uintptr_t)address, size};
    ssize_t got = process_vm_readv(tid, &local, 1, &remote, 1, 0);

    if (got < 0)
        return -errno;
    return (size_t)got == size ? 0 : -EFAULT;
}

/* In a child: open as one who has power in that user namespace, and pass the fd on. Only system calls: we have threads.
 */
_Noreturn static void open_in_child(int user_namespace, const char *path, int flags, int socket)
{
    struct mpu_header nothing = {0};
    /* It has every listener of ours: where it hangs in the open, it must not keep their callers waiting after us. */
    int fd =
        setns(user_namespace, CLONE_NEWUSER) || prctl(PR_SET_PDEATHSIG, SIGKILL) ? -1 : open(path, flags | O_CLOEXEC);
    struct parcel parcel = {.head = &nothing, .head_size = sizeof(nothing), .fds = &fd, .n_fds = 1};

    _exit(fd < 0 || packet_send(socket, &parcel, 0));
}

static int receive_fd(int socket)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    struct mpu_header nothing;
    struct iovec room = {&nothing, sizeof(nothing)};
    struct msghdr message = {
        .msg_iov = &room, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    int fd;

    if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC) <= 0 || !CMSG_FIRSTHDR(&message))
        return -EACCES;
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
    return fd;
}

/*
 * What only the caller's own user may open, as the owner of its user namespace: of a rootless engine, whose containers'
 * users are others than the engine's. One must be in the namespace for that, and a process with threads cannot go.
 */
static int open_as_owner(pid_t tid, const char *path, int flags)
{
    char link[PROC_PATH_MAX];
    AUTO_CLOSE user_namespace = -1;
    AUTO_CLOSE ours = -1;
    int ends[2], fd;
    pid_t child;

    snprintf(link, sizeof(link), "/proc/%d/ns/user", tid);
    user_namespace = open(link, O_RDONLY | O_CLOEXEC);
    if (user_namespace < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
        return -errno;
    ours = ends[0];
    child = fork();
    if (child == 0)
        open_in_child(user_namespace, path, flags, ends[1]);
    close(ends[1]);
    if (child < 0)
        return -EAGAIN;
    fd = receive_fd(ours);
    while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
        continue;
    return fd;
}

int caller_open(pid_t tid, const char *name, int flags)
{
    char path[PROC_PATH_MAX];
    int fd;

    snprintf(path, sizeof(path), "/proc/%d/%s", tid, name);
    fd = open(path, flags | O_CLOEXEC);
    if (fd < 0 && errno == EACCES)
        return open_as_owner(tid, path, flags);
    return fd < 0 ? -errno : fd;
}

int caller_read(int memory, uint64_t address, void *buffer, size_t size)
{
    ssize_t got = pread64(memory, buffer, size, (off64_t)address);

    if (got < 0)
        return errno == EIO ? -EFAULT : -errno;
    return (size_t)got == size ? 0 : -EFAULT;
}

int caller_write(int memory, uint64_t address, const void *buffer, size_t size)
{
    ssize_t put = pwrite64(memory, buffer, size, (off64_t)address);

    if (put < 0)
        return errno == EIO ? -EFAULT : -errno;
    return (size_t)put == size ? 0 : -EFAULT;
}

/* linux/fs.h, Linux 6.11 */
struct map_query {
    uint64_t size;
    uint64_t flags;
    uint64_t address;
    uint64_t start;
    uint64_t end;
    uint64_t unused[8];
};
static_assert(sizeof(struct map_query) == 104, "struct procmap_query");
#define MAP_QUERY _IOWR('f', 17, struct map_query)
#define MAP_QUERY_READABLE_AND_WRITABLE 3

/* The end of the readable and writable mapping that has this address, 0 where there is none. */
static uint64_t writable_until(int maps, uint64_t address)
{
    struct map_query query = {.size = sizeof(query), .flags = MAP_QUERY_READABLE_AND_WRITABLE, .address = address};

    return ioctl(maps, MAP_QUERY, &query) ? 0 : query.end;
}

/* The same before there was a query, from the text. The FILE is at its beginning. */
static uint64_t writable_until_in_text(FILE *text, uint64_t address)
{
    AUTO_FREE char *line = NULL;
    uint64_t first, last;
    char mode[5];
    size_t room = 0;

    while (getline(&line, &room, text) > 0) {
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s", &first, &last, mode) != 3 || last <= address)
            continue;
        return first <= address && mode[0] == 'r' && mode[1] == 'w' ? last : 0;
    }
    return 0;
}

static FILE *open_text(int maps)
{
    int copy = fcntl(maps, F_DUPFD_CLOEXEC, 0);
    FILE *text = copy < 0 ? NULL : fdopen(copy, "r");

    if (!text && copy >= 0)
        close(copy);
    return text;
}

/* /proc/TID/mem writes through page protections (FOLL_FORCE), the driver's copy_to_user does not: so look first. */
int caller_may_write(const struct kernel *kernel, int maps, uint64_t address, size_t size)
{
    uint64_t end, reached = address;
    FILE *text;

    if (__builtin_add_overflow(address, size, &end))
        return -EFAULT;
    text = kernel->map_query ? NULL : open_text(maps);
    if (!kernel->map_query && !text)
        return -errno;
    while (reached && reached < end) {
        if (text)
            rewind(text);
        reached = text ? writable_until_in_text(text, reached) : writable_until(maps, reached);
    }
    if (text)
        fclose(text);
    return reached ? 0 : -EFAULT;
}

static int check_identity(int dirfd, const char *path, int flags, const struct device *device)
{
    struct statx found;
    bool same;

    if (statx(dirfd, path, flags | AT_STATX_DONT_SYNC, STATX_TYPE | STATX_INO, &found))
        return -errno;
    if (device->is_device)
        same =
            S_ISCHR(found.stx_mode) && found.stx_rdev_major == device->major && found.stx_rdev_minor == device->minor;
    else
        same = !S_ISCHR(found.stx_mode) && found.stx_dev_major == device->major &&
               found.stx_dev_minor == device->minor && found.stx_ino == device->ino;
    return same ? 0 : -EXDEV;
}

int caller_check_file(pid_t tid, int fd, const struct device *device)
{
    char path[PROC_PATH_MAX];
    int error;

    if (fd < 0)
        return -EBADF;
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", tid, fd);
    error = check_identity(AT_FDCWD, path, 0, device);
    if (error == -EACCES) {
        AUTO_CLOSE place = open_as_owner(tid, path, O_PATH);

        error = place < 0 ? place : check_identity(place, "", AT_EMPTY_PATH, device);
    }
    return error;
}

/* The process of a thread, before PIDFD_THREAD; its files are the thread's only where the kernel says so. */
static int pidfd_of_process(pid_t tid)
{
    char path[PROC_PATH_MAX], line[256];
    pid_t tgid = 0;
    FILE *status;

    snprintf(path, sizeof(path), "/proc/%d/status", tid);
    status = fopen(path, "re");
    if (!status)
        return -errno;
    while (tgid == 0 && fgets(line, sizeof(line), status))
        sscanf(line, "Tgid: %d", &tgid);
    fclose(status);
    if (tgid <= 0)
        return -ESRCH;
    if (tgid != tid && syscall(SYS_kcmp, tid, tgid, KCMP_FILES, 0, 0) != 0)
        return -EOPNOTSUPP;
    return pidfd_open(tgid, 0);
}

int caller_fetch_file(const struct kernel *kernel, pid_t tid, int fd, const struct device *device)
{
    AUTO_CLOSE pidfd = kernel->pidfd_thread ? pidfd_open(tid, PIDFD_THREAD_FLAG) : pidfd_of_process(tid);
    int file, error;

    if (pidfd < 0)
        return pidfd;
    file = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0);
    if (file < 0)
        return -errno;
    error = check_identity(file, "", AT_EMPTY_PATH, device);
    if (error) {
        close(file);
        return error;
    }
    return file;
}
