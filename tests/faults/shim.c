/* Reads and writes of an expert store that fail or are slow, for a process started with LD_PRELOAD.
 *
 * SHIM_FILE: end of the file's path. SHIM_READ_ERRNO, SHIM_WRITE_ERRNO: fail with this number;
 * SHIM_AFTER: let so many calls through first; SHIM_COUNT: fail so many (default: all);
 * SHIM_DELAY_MS: sleep before each read; SHIM_ARMED: a file that has to exist for any of this. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;

static long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

static int concerns(int fd) {
    char link[64], path[4096];
    const char *end = getenv("SHIM_FILE"), *armed = getenv("SHIM_ARMED");
    if (!end || (armed && access(armed, F_OK) != 0)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < (ssize_t)strlen(end)) return 0;
    path[length] = 0;
    return strcmp(path + length - strlen(end), end) == 0;
}

static int fails(int fd, const char *variable) {
    long error = number(variable, 0);
    if (!error || !concerns(fd)) return 0;
    long call = atomic_fetch_add(&calls, 1) - number("SHIM_AFTER", 0);
    if (call < 0 || call >= number("SHIM_COUNT", 1L << 40)) return 0;
    errno = (int)error;
    return 1;
}

static void delay(int fd) {
    long milliseconds = number("SHIM_DELAY_MS", 0);
    if (milliseconds && concerns(fd)) usleep((useconds_t)milliseconds * 1000);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset) {
    delay(fd);
    return fails(fd, "SHIM_READ_ERRNO") ? -1 : NEXT(preadv)(fd, parts, count, offset);
}
ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t offset) {
    delay(fd);
    return fails(fd, "SHIM_READ_ERRNO") ? -1 : NEXT(preadv64)(fd, parts, count, offset);
}
ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    delay(fd);
    return fails(fd, "SHIM_READ_ERRNO") ? -1 : NEXT(preadv2)(fd, parts, count, offset, flags);
}
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    delay(fd);
    return fails(fd, "SHIM_READ_ERRNO") ? -1 : NEXT(preadv64v2)(fd, parts, count, offset, flags);
}
ssize_t pread(int fd, void *to, size_t size, off_t offset) {
    delay(fd);
    return fails(fd, "SHIM_READ_ERRNO") ? -1 : NEXT(pread)(fd, to, size, offset);
}
ssize_t pread64(int fd, void *to, size_t size, off64_t offset) {
    delay(fd);
    return fails(fd, "SHIM_READ_ERRNO") ? -1 : NEXT(pread64)(fd, to, size, offset);
}
ssize_t pwrite(int fd, const void *from, size_t size, off_t offset) {
    return fails(fd, "SHIM_WRITE_ERRNO") ? -1 : NEXT(pwrite)(fd, from, size, offset);
}
ssize_t pwrite64(int fd, const void *from, size_t size, off64_t offset) {
    return fails(fd, "SHIM_WRITE_ERRNO") ? -1 : NEXT(pwrite64)(fd, from, size, offset);
}
