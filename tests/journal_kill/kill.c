/* Preloaded into a process: kills it with SIGKILL at the n-th call that makes a database durable (pwrite64, fdatasync, fsync).
   kill_arm(n) starts counting; kill_count() tells how many there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

static long armed = -1, seen = 0;

void kill_arm(long n) { seen = 0; armed = n; }
long kill_count(void) { return seen; }

static void count(void) {
    if (armed >= 0 && ++seen == armed) kill(getpid(), SIGKILL);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    static ssize_t (*next)(int, const void *, size_t, off64_t);
    if (!next) next = dlsym(RTLD_NEXT, "pwrite64");
    count();
    return next(fd, data, size, at);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    static ssize_t (*next)(int, const void *, size_t, off_t);
    if (!next) next = dlsym(RTLD_NEXT, "pwrite");
    count();
    return next(fd, data, size, at);
}

int fdatasync(int fd) {
    static int (*next)(int);
    if (!next) next = dlsym(RTLD_NEXT, "fdatasync");
    count();
    return next(fd);
}

int fsync(int fd) {
    static int (*next)(int);
    if (!next) next = dlsym(RTLD_NEXT, "fsync");
    count();
    return next(fd);
}
