/*
 * mpu-notify-runtime: an OCI runtime that is another one, but for containers that opted in.
 *
 * Engines call a runtime for every little thing, so this looks only at what `create` and `run` are about to start, and
 * only for whether the name of our annotation occurs in it. Where it does, oci/shim.py looks properly, rewrites the
 * spec and becomes the real runtime; everywhere else this does, with the arguments as they came. What is wrong with the
 * configuration is for shim.py to say: nothing of ours may be in the way of a container that has nothing to do with us.
 *
 * An engine calls it by the name of a handler: a file with `#!PROGRAM --handler` in its first line, which `mpu-notify
 * configure` writes. The kernel starts PROGRAM with the file's name behind --handler. The file says which runtime
 * stands behind this one (runtime = "PATH") and may name a configuration (config = "FILE"): engines pass neither
 * arguments nor an environment on that could, for all verbs.
 */
#include "settings.h"

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define ANNOTATION "io.mpu-notify.enable"
#define PASSED_VARIABLE "MPU_NOTIFY_RUNTIME_PASSED" /* what this process became last time: PID PATH */
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define BY "by [runtime] path in %s or, as the engine's own, by \"mpu-notify configure ENGINE --real-runtime PATH\""
#define MAX_SPEC (16 * 1024 * 1024) /* a larger one is for shim.py to look at */
#define MAX_ARGUMENTS 4096
#define MAX_MESSAGE (3 * PATH_MAX)

/* What the command line says; "" where it says nothing. */
struct command {
    const char *verb;
    const char *bundle;
    const char *log;
    const char *log_format;
    const char *container;
};

struct settings {
    char file[PATH_MAX]; /* the configuration */
    char path[PATH_MAX]; /* the real runtime, "" for the first there is */
    bool by_name;        /* every container of this runtime opted in */
};

enum found { NOTHING, OURS, PROGRAM };

static const char *const verbs[] = {"checkpoint", "create", "delete", "events", "exec",    "features", "init",
                                    "kill",       "list",   "pause",  "ps",     "restore", "resume",   "run",
                                    "spec",       "start",  "state",  "update", "help",    "mounts"};
static const char *const runtimes[] = {"runc", "crun"};
static const char *const flags_alone[] = {"debug", "systemd-cgroup", "help", "h", "version", "v"};
static const char *const flags_with_value[] = {
    "root",           "criu",     "rootless",     "cgroup-manager", "log-level",
    "console-socket", "pid-file", "preserve-fds", "config",         "f"};

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* Whether the first `length` bytes of `word` are all of `name`. */
static bool is(const char *word, size_t length, const char *name)
{
    return strlen(name) == length && memcmp(word, name, length) == 0;
}

static bool is_any_of(const char *word, size_t length, const char *const *names, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (is(word, length, names[i]))
            return true;
    return false;
}

/* Where a flag's value goes that we want to know, else NULL. */
static const char **place_of(struct command *command, const char *name, size_t length)
{
    if (is(name, length, "log"))
        return &command->log;
    if (is(name, length, "log-format"))
        return &command->log_format;
    return is(name, length, "bundle") || is(name, length, "b") ? &command->bundle : NULL;
}

/*
 * Take the flag at argv[i], in the forms of both runtimes: one dash or two, value behind "=" or in the next word. A
 * flag that we do not know may have one: the next word is taken for it where that is neither a flag nor a verb, as long
 * as the verb is still to come. Returns how many words the flag has.
 */
static int take_flag(struct command *command, int argc, char **argv, int i)
{
    const char *name = argv[i] + (argv[i][1] == '-' ? 2 : 1);
    const char *equals = strchr(name, '=');
    size_t length = equals ? (size_t)(equals - name) : strlen(name);
    const char **place = place_of(command, name, length);
    const char *next = i + 1 < argc ? argv[i + 1] : "";

    if (place)
        *place = equals ? equals + 1 : next;
    if (equals || is_any_of(name, length, flags_alone, COUNT(flags_alone)))
        return 1;
    if (place || is_any_of(name, length, flags_with_value, COUNT(flags_with_value)))
        return 2;
    return *command->verb || *next == '-' || is_any_of(next, strlen(next), verbs, COUNT(verbs)) ? 1 : 2;
}

static struct command read_command(int argc, char **argv)
{
    struct command command = {"", "", "", "", ""};
    bool flags = true;

    for (int i = 1; i < argc;) {
        if (flags && strcmp(argv[i], "--") == 0) {
            flags = false;
            i++;
        } else if (flags && argv[i][0] == '-' && argv[i][1]) {
            i += take_flag(&command, argc, argv, i);
        } else {
            *(*command.verb ? &command.container : &command.verb) = argv[i];
            i++;
        }
    }
    return command;
}

/* What a handler says and then what the configuration says, where both may say it. Returns 0 or a negative errno. */
static int read_settings(const char *handler, struct settings *settings)
{
    const char *file = getenv(SETTINGS_VARIABLE);
    AUTO_FREE char *handler_text = NULL, *text = NULL;
    char own_path[PATH_MAX] = "", opt_in[16] = "";

    strcpy(settings->file, SETTINGS_FILE);
    if (handler) {
        handler_text = settings_text(handler);
        if (!handler_text)
            return -errno;
        settings_find(handler_text, "", "runtime", settings->path, sizeof(settings->path));
        settings_find(handler_text, "", "config", settings->file, sizeof(settings->file));
    }
    if (file && *file && strlen(file) < sizeof(settings->file))
        strcpy(settings->file, file);
    text = settings_text(settings->file);
    if (!text)
        return 0;
    settings_find(text, "runtime", "path", own_path, sizeof(own_path));
    settings_find(text, "runtime", "opt_in", opt_in, sizeof(opt_in));
    if (*own_path)
        strcpy(settings->path, own_path);
    settings->by_name = strcmp(opt_in, "name") == 0;
    return 0;
}

/* `text` as what stands between the quotes of a string in JSON, which logrus' text form takes, too. */
static void escape(char *out, size_t size, const char *text)
{
    size_t used = 0;

    for (; *text && used + sizeof("\\u0000") < size; text++) {
        unsigned char byte = (unsigned char)*text;

        if (byte < 0x20)
            used += (size_t)snprintf(out + used, size - used, "\\u%04x", byte);
        else {
            if (byte == '"' || byte == '\\')
                out[used++] = '\\';
            out[used++] = (char)byte;
        }
    }
    out[used] = 0;
}

/* Whether crun's --log names no file. */
static bool is_elsewhere(const char *log)
{
    return strncmp(log, "syslog:", 7) == 0 || strncmp(log, "journald:", 9) == 0;
}

/* Say what is wrong where an engine looks for it: in the runtime's log, in its form, and on standard error. */
__attribute__((format(printf, 2, 3))) static int complain(const struct command *command, const char *format, ...)
{
    char message[MAX_MESSAGE], escaped[2 * MAX_MESSAGE], moment[32];
    time_t now = time(NULL);
    struct tm utc;
    const char *file = command->log + (strncmp(command->log, "file:", 5) == 0 ? 5 : 0);
    va_list values;
    AUTO_CLOSE log = -1;

    va_start(values, format);
    vsnprintf(message, sizeof(message), format, values);
    va_end(values);
    fprintf(stderr, "mpu-notify-runtime: %s\n", message);
    log = *file && !is_elsewhere(file) ? open(file, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (log >= 0 && gmtime_r(&now, &utc) && strftime(moment, sizeof(moment), "%Y-%m-%dT%H:%M:%SZ", &utc)) {
        escape(escaped, sizeof(escaped), message);
        dprintf(log,
                strcmp(command->log_format, "json") == 0 ? "{\"time\":\"%s\",\"level\":\"error\",\"msg\":\"%s\"}\n"
                                                         : "time=\"%s\" level=error msg=\"%s\"\n",
                moment, escaped);
    }
    return 1;
}

static bool is_same_file(const struct stat *one, const char *path)
{
    struct stat other;

    return !stat(path, &other) && one->st_dev == other.st_dev && one->st_ino == other.st_ino;
}

/* What is at `path`: OURS is this program, or the handler by which it was called. */
static enum found look_at(const char *path, const char *handler)
{
    struct stat status;

    if (stat(path, &status) || !S_ISREG(status.st_mode) || access(path, X_OK))
        return NOTHING;
    return is_same_file(&status, "/proc/self/exe") || (handler && is_same_file(&status, handler)) ? OURS : PROGRAM;
}

/* Find a program as a shell would, but for ours. */
static enum found find_program(const char *name, const char *handler, char out[PATH_MAX])
{
    const char *folders = getenv("PATH");
    enum found best = NOTHING;

    if (strchr(name, '/'))
        return snprintf(out, PATH_MAX, "%s", name) < PATH_MAX ? look_at(out, handler) : NOTHING;
    for (folders = folders && *folders ? folders : DEFAULT_PATH;; folders++) {
        size_t length = strcspn(folders, ":");
        int written = snprintf(out, PATH_MAX, "%.*s/%s", (int)length, folders, name);
        enum found found = length && length < PATH_MAX && written < PATH_MAX ? look_at(out, handler) : NOTHING;

        if (found == PROGRAM)
            return PROGRAM;
        if (found == OURS)
            best = OURS;
        folders += length;
        if (!*folders)
            return best;
    }
}

static enum found find_runtime(const struct settings *settings, const char *handler, char out[PATH_MAX])
{
    if (*settings->path)
        return find_program(settings->path, handler, out);
    for (size_t i = 0; i < COUNT(runtimes); i++)
        if (find_program(runtimes[i], handler, out) == PROGRAM)
            return PROGRAM;
    return NOTHING;
}

/*
 * Whether this process has been this program before and became the same runtime: then that one starts ours in its place
 * (nvidia-container-runtime starts what its own configuration names), and would again and again.
 */
static bool comes_back(const char *runtime)
{
    const char *before = getenv(PASSED_VARIABLE);
    char now[PATH_MAX + 32];

    snprintf(now, sizeof(now), "%ld %s", (long)getpid(), runtime);
    if (before && strcmp(before, now) == 0)
        return true;
    setenv(PASSED_VARIABLE, now, 1); /* fails for want of memory only, as what follows would */
    return false;
}

static bool must_rewrite(const struct command *command, const struct settings *settings)
{
    AUTO_FREE char *spec = NULL;
    char path[PATH_MAX];
    size_t size;

    if (strcmp(command->verb, "create") != 0 && strcmp(command->verb, "run") != 0)
        return false;
    if (snprintf(path, sizeof(path), "%s/config.json", *command->bundle ? command->bundle : ".") >= PATH_MAX)
        return false;
    spec = read_file(path, MAX_SPEC, &size);
    if (!spec)
        return errno == EFBIG; /* else the runtime says what is wrong with it */
    return settings->by_name || memmem(spec, size, ANNOTATION, strlen(ANNOTATION));
}

/* Cut the last part off a path and return it, or "" where there is none. */
static const char *cut(char *path)
{
    char *slash = strrchr(path, '/');

    if (!slash)
        return "";
    *slash = 0;
    return slash + 1;
}

/* The Python that our package is installed for, else the system's. */
static bool find_python(const char *package, char out[PATH_MAX])
{
    char prefix[PATH_MAX];
    const char *folder;

    strcpy(prefix, package);
    cut(prefix);
    folder = cut(prefix);
    if ((strcmp(folder, "site-packages") == 0 || strcmp(folder, "dist-packages") == 0) &&
        strncmp(cut(prefix), "python3", strlen("python3")) == 0 && strcmp(cut(prefix), "lib") == 0 &&
        snprintf(out, PATH_MAX, "%s/bin/python3", prefix) < PATH_MAX && look_at(out, NULL) == PROGRAM)
        return true;
    return find_program("/usr/bin/python3", NULL, out) == PROGRAM || find_program("python3", NULL, out) == PROGRAM;
}

/* Have shim.py rewrite the spec and become the runtime. Returns only where that cannot be started. */
static int become_shim(const struct command *command, struct settings *settings, char *runtime, int argc, char **argv)
{
    char package[PATH_MAX], shim[PATH_MAX], python[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", package, sizeof(package));
    const char *words[MAX_ARGUMENTS + 1];
    const char *head[] = {python,
                          "-I",
                          "-S",
                          shim,
                          settings->file,
                          runtime,
                          command->bundle,
                          command->log,
                          command->log_format,
                          command->container};

    if (length < 0 || (size_t)length >= sizeof(package))
        return complain(command, "cannot find my own program by /proc/self/exe: mount /proc");
    package[length] = 0;
    cut(package);
    cut(package);
    if (snprintf(shim, sizeof(shim), "%s/oci/shim.py", package) >= PATH_MAX)
        return complain(command, "cannot rewrite the spec: the path of my own package %s is too long", package);
    if (!find_python(package, python))
        return complain(command, "cannot rewrite the spec: no python3 in /usr/bin or PATH, install one");
    if ((size_t)argc + COUNT(head) > MAX_ARGUMENTS)
        return complain(command, "cannot rewrite the spec: %d arguments are too many", argc);
    memcpy(words, head, sizeof(head));
    memcpy(words + COUNT(head), argv + 1, (size_t)argc * sizeof(*argv)); /* with the NULL at the end */
    execv(python, (char **)(uintptr_t)words);                            /* which changes none of them */
    return complain(command, "cannot rewrite the spec: cannot execute %s: %s", python, strerror(errno));
}

int main(int argc, char **argv)
{
    const char *handler = argc > 2 && strcmp(argv[1], "--handler") == 0 ? argv[2] : NULL;
    struct command command;
    struct settings settings = {0};
    char runtime[PATH_MAX];
    int error = read_settings(handler, &settings);
    enum found found;

    if (handler) {
        argc -= 2;
        argv += 2;
    }
    command = read_command(argc, argv);
    if (error)
        return complain(&command, "cannot read the handler %s: %s", handler, strerror(-error));
    found = find_runtime(&settings, handler, runtime);
    if (found == OURS)
        return complain(&command,
                        "the real OCI runtime cannot be %s, which is mpu-notify-runtime itself: name runc or crun " BY,
                        settings.path, settings.file);
    if (found == NOTHING)
        return complain(&command, "cannot find the real OCI runtime %s: install it, or name it " BY,
                        *settings.path ? settings.path : "(runc or crun in PATH)", settings.file);
    if (comes_back(runtime))
        return complain(&command,
                        "the real OCI runtime cannot be %s, which starts mpu-notify-runtime again: have it start runc "
                        "or crun (nvidia-container-runtime: by `runtimes` in its config.toml), or name another one " BY,
                        runtime, settings.file);
    if (must_rewrite(&command, &settings))
        return become_shim(&command, &settings, runtime, argc, argv);
    argv[0] = runtime;
    execv(runtime, argv);
    return complain(&command, "cannot execute the real OCI runtime %s: %s", runtime, strerror(errno));
}
