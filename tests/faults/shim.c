// LD_PRELOAD: counts the calls that change (or read) files below one folder, and breaks the k-th of them.
//
// The processes of a run count together, in shared memory that the test's resident process arms before it forks them:
//
//     fault_arm(folder, k, errno or 0, sticky, run, victim, reads)
//
// errno: the call fails, and with `sticky` every later one too (a full disk still deletes). victim: RUN or HELPER, the
// process `run` or another one that makes the call; then only the calls of others are counted. It dies before the call,
// or, where that is a write, in the middle of it: half of the bytes are there. A stream's own writes are not seen, so
// what it would lose is lost when it is closed.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

static struct {
    _Atomic long calls;
    long at;
    int error, sticky, victim, reads;
    pid_t run;
    char under[PATH_MAX];
} *orders;

enum kind { CHANGE, ALLOCATE, READ };
enum victim { NOBODY, RUN, HELPER };

__attribute__((constructor)) static void prepare(void) {
    orders = mmap(NULL, sizeof *orders, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void fault_arm(const char *under, long at, int error, int sticky, int run, int victim, int reads) {
    orders->at = at, orders->error = error, orders->sticky = sticky, orders->reads = reads;
    orders->run = run, orders->victim = victim;
    snprintf(orders->under, sizeof orders->under, "%s", under);
    orders->calls = 0;
}

long fault_calls(void) { return orders->calls; }

static int below(const char *path) {
    size_t length = strlen(orders->under);
    return length && !strncmp(path, orders->under, length) && (path[length] == '/' || !path[length]);
}

static int fd_below(int fd) {
    char link[64], path[PATH_MAX];
    if (!orders->under[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static int path_below(int fd, const char *path) {
    return path[0] == '/' || fd == AT_FDCWD ? below(path) : fd_below(fd);
}

// 0: go on. 1: this call fails, errno is set. 2: somebody dies now.
static int verdict(enum kind kind, int concerned) {
    if (!concerned || (kind == READ) != orders->reads) return 0;
    if (orders->victim == HELPER && getpid() == orders->run) return 0;
    long call = atomic_fetch_add(&orders->calls, 1) + 1;
    if (!orders->at || call < orders->at || (call > orders->at && !orders->sticky)) return 0;
    if (orders->victim) return 2;
    if (orders->error == ENOSPC && kind != ALLOCATE) return 0;
    errno = orders->error;
    return 1;
}

static void die(void) {
    kill(orders->victim == RUN ? orders->run : getpid(), SIGKILL);
    for (;;) pause();  // the victim was our parent, and its death is ours
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define SIMPLE(name, kind, concerned, declared, passed)          \
    int name declared {                                          \
        int found = verdict(kind, concerned);                    \
        if (found == 2) die();                                   \
        return found ? -1 : REAL(name) passed;                   \
    }

#define WRITES(name, fd, declared, passed_half, passed)          \
    ssize_t name declared {                                      \
        int found = verdict(ALLOCATE, fd_below(fd));             \
        if (found == 2) {                                        \
            if (REAL(name) passed_half < 0) { }                  \
            die();                                               \
        }                                                        \
        return found ? -1 : REAL(name) passed;                   \
    }

#define OPENS(name)                                                                            \
    int name(const char *path, int flags, ...) {                                               \
        va_list rest;                                                                          \
        va_start(rest, flags);                                                                 \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                \
        va_end(rest);                                                                          \
        int found = flags & O_CREAT ? verdict(ALLOCATE, below(path)) : 0;                      \
        if (found == 2) die();                                                                 \
        return found ? -1 : REAL(name)(path, flags, mode);                                     \
    }

#define OPENS_AT(name)                                                                         \
    int name(int fd, const char *path, int flags, ...) {                                       \
        va_list rest;                                                                          \
        va_start(rest, flags);                                                                 \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                \
        va_end(rest);                                                                          \
        int found = flags & O_CREAT ? verdict(ALLOCATE, path_below(fd, path)) : 0;             \
        if (found == 2) die();                                                                 \
        return found ? -1 : REAL(name)(fd, path, flags, mode);                                 \
    }

OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)
WRITES(write, fd, (int fd, const void *from, size_t n), (fd, from, n / 2), (fd, from, n))
WRITES(pwrite, fd, (int fd, const void *from, size_t n, off_t at), (fd, from, n / 2, at), (fd, from, n, at))
WRITES(pwrite64, fd, (int fd, const void *from, size_t n, off64_t at), (fd, from, n / 2, at), (fd, from, n, at))
WRITES(sendfile, to, (int to, int from, off_t *at, size_t n), (to, from, at, n / 2), (to, from, at, n))
WRITES(sendfile64, to, (int to, int from, off64_t *at, size_t n), (to, from, at, n / 2), (to, from, at, n))
WRITES(copy_file_range, to, (int from, off64_t *at, int to, off64_t *there, size_t n, unsigned flags),
       (from, at, to, there, n / 2, flags), (from, at, to, there, n, flags))
SIMPLE(ftruncate, ALLOCATE, fd_below(fd), (int fd, off_t n), (fd, n))
SIMPLE(ftruncate64, ALLOCATE, fd_below(fd), (int fd, off64_t n), (fd, n))
SIMPLE(fsync, CHANGE, fd_below(fd), (int fd), (fd))
SIMPLE(fdatasync, CHANGE, fd_below(fd), (int fd), (fd))
SIMPLE(rename, CHANGE, below(from), (const char *from, const char *to), (from, to))
SIMPLE(renameat, CHANGE, path_below(one, from), (int one, const char *from, int other, const char *to),
       (one, from, other, to))
SIMPLE(unlink, CHANGE, below(path), (const char *path), (path))
SIMPLE(unlinkat, CHANGE, path_below(fd, path), (int fd, const char *path, int flags), (fd, path, flags))
SIMPLE(rmdir, CHANGE, below(path), (const char *path), (path))
SIMPLE(mkdir, ALLOCATE, below(path), (const char *path, mode_t mode), (path, mode))
SIMPLE(symlink, ALLOCATE, below(path), (const char *target, const char *path), (target, path))

#define OPENS_STREAM(name)                                                                     \
    FILE *name(const char *path, const char *mode) {                                           \
        int found = mode[0] == 'r' ? 0 : verdict(ALLOCATE, below(path));                       \
        if (found == 2) die();                                                                 \
        return found ? NULL : REAL(name)(path, mode);                                          \
    }

OPENS_STREAM(fopen)
OPENS_STREAM(fopen64)

int fclose(FILE *stream) {
    int fd = fileno(stream), found = 0, error = 0;
    struct stat is;
    if (fd >= 0 && (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY && (found = verdict(ALLOCATE, fd_below(fd)))) {
        error = errno;
        fflush(stream);
        if (fstat(fd, &is) == 0 && REAL(ftruncate)(fd, is.st_size / 2) < 0) { }
        if (found == 2) die();
    }
    int closed = REAL(fclose)(stream);
    return found ? (errno = error, EOF) : closed;
}

#define READS(name, declared, passed)                            \
    ssize_t name declared {                                      \
        int found = verdict(READ, orders->reads && fd_below(fd)); \
        if (found == 2) die();                                   \
        return found ? -1 : REAL(name) passed;                   \
    }

READS(read, (int fd, void *into, size_t n), (fd, into, n))
READS(pread, (int fd, void *into, size_t n, off_t at), (fd, into, n, at))
READS(pread64, (int fd, void *into, size_t n, off64_t at), (fd, into, n, at))
