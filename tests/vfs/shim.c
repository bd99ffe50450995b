/* Preloaded into a process: stands between it and the disk, for files under one folder.

   shim_arm(folder, mode, n)   the n-th change of a file there (write, truncate, sync, unlink, rename, creation) meets its fault:
                               'k' the process dies by SIGKILL before it, 'e' a sync fails with EIO (others pass),
                               's' it and every later write fail with ENOSPC, '-' nothing: only counted
   shim_heal()                 no more faults
   shim_count()                changes seen since shim_arm
   shim_trace(fd)              from now on write every change to `fd` (see power_loss.py for the format)
   shim_mark(data, size)       put a mark into the trace: what the process has told others by now */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define FDS 4096
static char folder[1024];
static size_t folder_size;
static char *names[FDS];
static char mode;
static long armed, seen;
static int trace_fd = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define NEXT(name) \
    static __typeof__(&name) next; \
    if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static ssize_t real_write(int fd, const void *data, size_t size) {
    static ssize_t (*next_write)(int, const void *, size_t);
    if (!next_write) next_write = dlsym(RTLD_NEXT, "write");
    return next_write(fd, data, size);
}

void shim_arm(const char *where, char what, long n) {
    snprintf(folder, sizeof folder, "%s", where);
    folder_size = strlen(folder);
    seen = 0; armed = n; mode = what;
}
void shim_heal(void) { mode = '-'; }
long shim_count(void) { return seen; }

static void put(const void *data, size_t size) {
    const char *at = data;
    while (size) {
        ssize_t done = real_write(trace_fd, at, size);
        if (done <= 0) abort();
        at += done; size -= done;
    }
}

/* op: W write, T truncate, S sync, C create, U unlink, R rename (data: new name), D sync of a folder, M mark */
static void record(char op, const char *name, uint64_t at, const void *data, uint64_t size) {
    if (trace_fd < 0) return;
    struct __attribute__((packed)) { char op; uint16_t name; uint64_t at, size; } head = { op, strlen(name), at, size };
    pthread_mutex_lock(&lock);
    put(&head, sizeof head);
    put(name, head.name);
    if (data) put(data, size);
    pthread_mutex_unlock(&lock);
}
void shim_trace(int fd) { trace_fd = fd; }
void shim_mark(const void *data, uint64_t size) { record('M', "", 0, data, size); }

/* 0, or the errno that this change must fail with */
static int fault(int is_sync) {
    long now = __sync_add_and_fetch(&seen, 1);
    if (mode == 'k' && now == armed) kill(getpid(), SIGKILL);
    if (mode == 's' && now >= armed && !is_sync) return ENOSPC;
    if (mode == 'e' && now >= armed && is_sync) return EIO;
    return 0;
}

static const char *inside(const char *path) {
    return folder_size && strncmp(path, folder, folder_size) == 0 && (path[folder_size] == '/' || !path[folder_size]) ? path : NULL;
}
static const char *name_of(int fd) { return fd >= 0 && fd < FDS ? names[fd] : NULL; }

static int opened(int fd, const char *path, int flags, int fresh) {
    if (fd < 0 || fd >= FDS || !inside(path)) return fd;
    size_t size = strlen(path);
    free(names[fd]);
    names[fd] = size > 4 && !strcmp(path + size - 4, "-shm") ? NULL : strdup(path);  /* shared memory is not meant to last */
    if (names[fd] && fresh) record('C', path, 0, NULL, 0);
    if (names[fd] && !fresh && (flags & O_TRUNC)) record('T', path, 0, NULL, 0);
    return fd;
}

#define OPEN(symbol) \
    int symbol(const char *path, int flags, ...) { \
        NEXT(symbol); \
        va_list more; va_start(more, flags); mode_t bits = va_arg(more, mode_t); va_end(more); \
        int fresh = (flags & O_CREAT) && inside(path) && access(path, F_OK) != 0; \
        if (fresh && !strstr(path, "-shm")) { int failed = fault(0); if (failed) { errno = failed; return -1; } } \
        return opened(next(path, flags, bits), path, flags, fresh); \
    }
OPEN(open)
OPEN(open64)

int close(int fd) {
    NEXT(close);
    if (fd >= 0 && fd < FDS && names[fd]) { free(names[fd]); names[fd] = NULL; }
    return next(fd);
}

#define PWRITE(symbol, offset) \
    ssize_t symbol(int fd, const void *data, size_t size, offset at) { \
        NEXT(symbol); \
        const char *name = name_of(fd); \
        if (!name) return next(fd, data, size, at); \
        int failed = fault(0); \
        if (failed) { errno = failed; return -1; } \
        ssize_t done = next(fd, data, size, at); \
        if (done > 0) record('W', name, at, data, done); \
        return done; \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t write(int fd, const void *data, size_t size) {
    const char *name = name_of(fd);
    if (!name) return real_write(fd, data, size);
    int failed = fault(0);
    if (failed) { errno = failed; return -1; }
    off_t at = lseek(fd, 0, SEEK_CUR);
    ssize_t done = real_write(fd, data, size);
    if (done > 0) record('W', name, at, data, done);
    return done;
}

#define TRUNCATE(symbol, offset) \
    int symbol(int fd, offset size) { \
        NEXT(symbol); \
        const char *name = name_of(fd); \
        if (name) fault(1); \
        int done = next(fd, size); \
        if (name && done == 0) record('T', name, size, NULL, 0); \
        return done; \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define SYNC(symbol) \
    int symbol(int fd) { \
        NEXT(symbol); \
        const char *name = name_of(fd); \
        if (!name) return next(fd); \
        int failed = fault(1); \
        if (failed) { errno = failed; return -1; } \
        struct stat found; \
        record(fstat(fd, &found) == 0 && S_ISDIR(found.st_mode) ? 'D' : 'S', name, 0, NULL, 0); \
        return 0; /* what a real sync would cost is saved: the trace, or the page cache, keeps what was written */ \
    }
SYNC(fsync)
SYNC(fdatasync)

int unlink(const char *path) {
    NEXT(unlink);
    if (!inside(path) || strstr(path, "-shm")) return next(path);
    fault(1);
    int done = next(path);
    if (done == 0) record('U', path, 0, NULL, 0);
    return done;
}

int rename(const char *from, const char *to) {
    NEXT(rename);
    if (!inside(from)) return next(from, to);
    fault(1);
    int done = next(from, to);
    if (done == 0) record('R', from, 0, to, strlen(to));
    return done;
}
