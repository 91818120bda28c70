/*
 * Finding members in strict JSON text (RFC 8259), in place: nothing is copied, decoded or changed. Of an object with
 * the same name twice, nothing is taken; a name with an escape in it is no name that is looked for. UTF-8 is not
 * checked. A test compares all of this with Python's json.
 */
#ifndef MPU_JSON_SCAN_H
#define MPU_JSON_SCAN_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#define JSON_DEPTH 64 /* how deep values may be nested */

/* A value's text, or part of it. */
struct json {
    const char *at;
    const char *end;
};

/* A member that is looked for, and how often it was found. */
struct json_search {
    const char *name;
    struct json value;
    unsigned found;
};

static inline bool json_next_is(const struct json *text, const char *any)
{
    return text->at < text->end && *text->at && strchr(any, *text->at);
}

static inline bool json_take(struct json *text, const char *any)
{
    bool is = json_next_is(text, any);

    text->at += is;
    return is;
}

static inline void json_space(struct json *text)
{
    while (json_take(text, " \t\r\n"))
        continue;
}

static inline bool json_digits(struct json *text)
{
    bool some = false;

    while (json_take(text, "0123456789"))
        some = true;
    return some;
}

static inline bool json_number(struct json *text)
{
    json_take(text, "-");
    if (!json_take(text, "0") && !json_digits(text))
        return false;
    if (json_take(text, ".") && !json_digits(text))
        return false;
    if (!json_take(text, "eE"))
        return true;
    json_take(text, "+-");
    return json_digits(text);
}

static inline bool json_word(struct json *text, const char *word)
{
    size_t size = strlen(word);

    if ((size_t)(text->end - text->at) < size || memcmp(text->at, word, size) != 0)
        return false;
    text->at += size;
    return true;
}

static inline bool json_escape(struct json *text)
{
    if (!json_take(text, "u"))
        return json_take(text, "\"\\/bfnrt");
    for (int i = 0; i < 4; i++)
        if (!json_take(text, "0123456789abcdefABCDEF"))
            return false;
    return true;
}

static inline bool json_string(struct json *text)
{
    if (!json_take(text, "\""))
        return false;
    while (text->at < text->end) {
        unsigned char byte = (unsigned char)*text->at++;

        if (byte == '"')
            return true;
        if (byte < 0x20 || (byte == '\\' && !json_escape(text)))
            return false;
    }
    return false;
}

/* Whether a value is a string with no escapes and just this text. */
static inline bool json_string_is(struct json value, const char *text)
{
    size_t size = strlen(text);

    return (size_t)(value.end - value.at) == size + 2 && *value.at == '"' && memcmp(value.at + 1, text, size) == 0;
}

static inline bool json_value(struct json *text, unsigned depth, struct json_search *search);

static inline bool json_member(struct json *text, unsigned depth, struct json_search *search)
{
    struct json name = *text, value;

    if (!json_string(text))
        return false;
    name.end = text->at;
    json_space(text);
    if (!json_take(text, ":"))
        return false;
    json_space(text);
    value.at = text->at;
    if (!json_value(text, depth, NULL))
        return false;
    value.end = text->at;
    if (search && json_string_is(name, search->name)) {
        search->value = value;
        search->found++;
    }
    return true;
}

/* The rest of an object or an array, whose opening bracket was taken. */
static inline bool json_inside(struct json *text, const char *close, unsigned depth, struct json_search *search)
{
    json_space(text);
    if (json_take(text, close))
        return true;
    do {
        json_space(text);
        if (!(*close == '}' ? json_member(text, depth, search) : json_value(text, depth, NULL)))
            return false;
        json_space(text);
    } while (json_take(text, ","));
    return json_take(text, close);
}

/* Take one value; `search` looks into it where it is an object, and no deeper. */
static inline bool json_value(struct json *text, unsigned depth, struct json_search *search)
{
    if (depth == 0)
        return false;
    if (json_take(text, "{"))
        return json_inside(text, "}", depth - 1, search);
    if (json_take(text, "["))
        return json_inside(text, "]", depth - 1, NULL);
    if (json_next_is(text, "\""))
        return json_string(text);
    return json_word(text, "true") || json_word(text, "false") || json_word(text, "null") || json_number(text);
}

/*
 * A member of an object whose text is all there is but for space around it. -EINVAL where that is no strict JSON
 * object, -ENOENT where there is no such member, or it is null.
 */
static inline int json_find(struct json object, const char *name, struct json *value)
{
    struct json_search search = {.name = name};

    json_space(&object);
    if (!json_next_is(&object, "{") || !json_value(&object, JSON_DEPTH, &search))
        return -EINVAL;
    json_space(&object);
    if (object.at != object.end || search.found > 1)
        return -EINVAL;
    *value = search.value;
    return search.found && *search.value.at != 'n' ? 0 : -ENOENT;
}

/* Copy a string that has no escapes and no more than size - 1 bytes. */
static inline int json_text(struct json string, char *out, size_t size)
{
    size_t length = (size_t)(string.end - string.at);

    if (length < 2 || *string.at != '"' || memchr(string.at, '\\', length) || length - 2 >= size)
        return -EINVAL;
    memcpy(out, string.at + 1, length - 2);
    out[length - 2] = 0;
    return 0;
}

#endif
