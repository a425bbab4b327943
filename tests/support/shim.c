/* Stands between a process and its C library: calls on files below $SHIM_DIR can be made to fail, to be slow, or to
 * be the last thing the process does. Loaded with LD_PRELOAD; built by tests/support/shim.py.
 *
 * Faults: lines of the file $SHIM_CONTROL, "<op> <errno> <milliseconds>", looked at before each call. Ops are open
 * (for writing), write, read, sync, name (rename, mkdir, unlink, rmdir), size (truncate, allocate).
 * Deaths: shim_arm(n) kills the process at the n-th point; each call is two, one before it and one after it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static volatile long die_at, points;
static __thread int inside;

void shim_arm(long n) { points = 0; die_at = n; }
long shim_points(void) { return points; }

static void point(void) {
    long now = __sync_add_and_fetch(&points, 1);
    if (die_at > 0 && now == die_at) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
}

static int below(const char *path) {
    const char *root = getenv("SHIM_DIR");
    return root && path && strncmp(path, root, strlen(root)) == 0;
}

static int fd_below(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

/* 0: go on. -1: errno is set. */
static int fault(const char *op) {
    const char *file = getenv("SHIM_CONTROL");
    char text[256], name[16];
    int error, ms, result = 0;
    if (!file) return 0;
    int fd = syscall(SYS_openat, AT_FDCWD, file, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t n = syscall(SYS_read, fd, text, sizeof text - 1);
    syscall(SYS_close, fd);
    text[n > 0 ? n : 0] = 0;
    for (char *line = text; line && *line; line = strchr(line, '\n'), line = line ? line + 1 : NULL) {
        if (sscanf(line, "%15s %d %d", name, &error, &ms) != 3 || strcmp(name, op)) continue;
        struct timespec wait = {ms / 1000, (ms % 1000) * 1000000L};
        if (ms) nanosleep(&wait, NULL);
        if (error) { errno = error; result = -1; }
    }
    return result;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define GUARDED(type, watched, op, call)            \
    do {                                            \
        if (inside || !(watched)) return (call);    \
        inside = 1;                                 \
        point();                                    \
        type result = fault(op);                    \
        if (result == 0) result = (call);           \
        int kept = errno;                           \
        point();                                    \
        inside = 0;                                 \
        errno = kept;                               \
        return result;                              \
    } while (0)

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }
#define MODE(flags) \
    mode_t mode = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, int); va_end(a); }

int open(const char *path, int flags, ...) { MODE(flags) GUARDED(int, writes(flags) && below(path), "open", REAL(open)(path, flags, mode)); }
int open64(const char *path, int flags, ...) { MODE(flags) GUARDED(int, writes(flags) && below(path), "open", REAL(open64)(path, flags, mode)); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) GUARDED(int, writes(flags) && below(path), "open", REAL(openat)(at, path, flags, mode)); }
ssize_t write(int fd, const void *data, size_t n) { GUARDED(ssize_t, fd_below(fd), "write", REAL(write)(fd, data, n)); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { GUARDED(ssize_t, fd_below(fd), "write", REAL(pwrite)(fd, data, n, at)); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { GUARDED(ssize_t, fd_below(fd), "write", REAL(pwrite64)(fd, data, n, at)); }
ssize_t pread64(int fd, void *data, size_t n, off64_t at) { GUARDED(ssize_t, fd_below(fd), "read", REAL(pread64)(fd, data, n, at)); }
ssize_t preadv(int fd, const struct iovec *v, int n, off_t at) { GUARDED(ssize_t, fd_below(fd), "read", REAL(preadv)(fd, v, n, at)); }
ssize_t preadv64(int fd, const struct iovec *v, int n, off64_t at) { GUARDED(ssize_t, fd_below(fd), "read", REAL(preadv64)(fd, v, n, at)); }
ssize_t preadv2(int fd, const struct iovec *v, int n, off_t at, int f) { GUARDED(ssize_t, fd_below(fd), "read", REAL(preadv2)(fd, v, n, at, f)); }
ssize_t preadv64v2(int fd, const struct iovec *v, int n, off64_t at, int f) { GUARDED(ssize_t, fd_below(fd), "read", REAL(preadv64v2)(fd, v, n, at, f)); }
int fsync(int fd) { GUARDED(int, fd_below(fd), "sync", REAL(fsync)(fd)); }
int fdatasync(int fd) { GUARDED(int, fd_below(fd), "sync", REAL(fdatasync)(fd)); }
int ftruncate(int fd, off_t n) { GUARDED(int, fd_below(fd), "size", REAL(ftruncate)(fd, n)); }
int ftruncate64(int fd, off64_t n) { GUARDED(int, fd_below(fd), "size", REAL(ftruncate64)(fd, n)); }
int fallocate(int fd, int m, off_t at, off_t n) { GUARDED(int, fd_below(fd), "size", REAL(fallocate)(fd, m, at, n)); }
int rename(const char *from, const char *to) { GUARDED(int, below(to), "name", REAL(rename)(from, to)); }
int mkdir(const char *path, mode_t mode) { GUARDED(int, below(path), "name", REAL(mkdir)(path, mode)); }
int unlink(const char *path) { GUARDED(int, below(path), "name", REAL(unlink)(path)); }
int rmdir(const char *path) { GUARDED(int, below(path), "name", REAL(rmdir)(path)); }
