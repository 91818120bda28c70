/*
 * What the programs that engines start read of a settings file: lines `key = "string"` below a `[section]`, as
 * mpu_notify/oci/settings.py reads them. It also says what is wrong with a file; here that is as good as not set.
 */
#ifndef MPU_SETTINGS_H
#define MPU_SETTINGS_H

#include "cleanup.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SETTINGS_FILE "/etc/mpu-notify/config.toml"
#define SETTINGS_VARIABLE "MPU_NOTIFY_CONFIG" /* names another file */
#define SETTINGS_MAX (64 * 1024)

/* All of a file, with a 0 behind it, or NULL with errno set: EFBIG where it is larger than `limit`. */
static inline char *read_file(const char *path, size_t limit, size_t *size)
{
    AUTO_CLOSE fd = open(path, O_RDONLY | O_CLOEXEC);
    AUTO_FREE char *content = NULL;
    struct stat status;
    char *whole;

    if (fd < 0 || fstat(fd, &status))
        return NULL;
    if (status.st_size < 0 || (uint64_t)status.st_size > limit) {
        errno = EFBIG;
        return NULL;
    }
    content = malloc((size_t)status.st_size + 1);
    if (!content)
        return NULL;
    for (*size = 0; *size < (size_t)status.st_size;) {
        ssize_t got = read(fd, content + *size, (size_t)status.st_size - *size);

        if (got < 0)
            return NULL;
        if (got == 0)
            break;
        *size += (size_t)got;
    }
    content[*size] = 0;
    whole = content;
    content = NULL;
    return whole;
}

/* The text of a settings file, or NULL where there is none. */
static inline char *settings_text(const char *file)
{
    size_t size;

    return read_file(file, SETTINGS_MAX, &size);
}

static inline const char *settings_skip(const char *at)
{
    return at + strspn(at, " \t");
}

/* Whether `at` begins with `word`; where it then goes on, blanks skipped. */
static inline bool settings_take(const char **at, const char *word)
{
    size_t length = strlen(word);

    if (strncmp(*at, word, length) != 0)
        return false;
    *at = settings_skip(*at + length);
    return true;
}

/* Whether lines are of this section from this one on, where it begins a section; else as before. */
static inline bool settings_within(const char *line, const char *section, bool before)
{
    const char *name;
    size_t length;

    if (!settings_take(&line, "["))
        return before;
    name = line;
    length = strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-");
    line = settings_skip(name + length);
    if (!length || *line != ']')
        return before;
    line = settings_skip(line + 1);
    if (*line && !strchr("#\r\n", *line))
        return before;
    return strlen(section) == length && memcmp(name, section, length) == 0;
}

/* The string of a line `key = "string"`, with its length, or NULL. */
static inline const char *settings_value(const char *line, const char *key, size_t *length)
{
    const char *end;
    char quote;

    if (!settings_take(&line, key) || !settings_take(&line, "="))
        return NULL;
    quote = *line++;
    if (quote != '"' && quote != '\'')
        return NULL;
    for (end = line; *end && *end != quote && *end != '\n' && *end != '\r'; end++)
        if (quote == '"' && *end == '\\')
            return NULL;
    *length = (size_t)(end - line);
    return *end == quote ? line : NULL;
}

/* Put what a key is set to into `out`, the last time it is, if that fits; "" is the section before the first one. */
static inline void settings_find(const char *text, const char *section, const char *key, char *out, size_t size)
{
    bool within = !*section;

    for (const char *line = text; line; line = strpbrk(line, "\r\n")) {
        const char *value;
        size_t length;

        line = settings_skip(line + strspn(line, "\r\n"));
        within = settings_within(line, section, within);
        value = within ? settings_value(line, key, &length) : NULL;
        if (value && length < size) {
            memcpy(out, value, length);
            out[length] = 0;
        }
    }
}

#endif
