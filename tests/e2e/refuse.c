/* A kernel that lacks an offload, or loses it while a program runs: preloaded into the program.
 *
 * REFUSE names what is missing, in words that are separated by commas:
 *   gso-probe   the socket option UDP_SEGMENT is unknown (Linux before 4.18)
 *   gro-probe   the socket option UDP_GRO is unknown (Linux before 5.0)
 *   tun-probe   TUNSETOFFLOAD is refused
 *   uso-probe   TUNSETOFFLOAD does not know UDP (Linux before 6.2)
 *   gso-eio     trains of datagrams fail with EIO, after REFUSE_AFTER that were sent
 *   gso-einval  the same with EINVAL
 *   packets     the thread that reads a node's sockets, and those of a relay, get EBADF for what they
 *               wait for or read, after REFUSE_AFTER times
 *   tso         TCP trains are refused by the TUN device, after REFUSE_AFTER
 *   uso         UDP trains are refused by the TUN device, after REFUSE_AFTER
 * Everything that is refused had no effect, as in the kernel. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#include <linux/if_tun.h>

#define SOL_UDP_LEVEL 17
#define UDP_SEGMENT_OPTION 103
#define UDP_GRO_OPTION 104
#define USO_BITS 0x60 /* TUN_F_USO4 and TUN_F_USO6 */

static int refuses(const char *word) {
    const char *words = getenv("REFUSE");
    size_t length = strlen(word);
    for (const char *at = words; at && (at = strstr(at, word)); at += length) {
        int begins = at == words || at[-1] == ',';
        if (begins && (at[length] == 0 || at[length] == ',')) return 1;
    }
    return 0;
}

static int is_over(atomic_long *seen) {
    const char *after = getenv("REFUSE_AFTER");
    return atomic_fetch_add(seen, 1) >= (after ? atol(after) : 0);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    static atomic_long trains;
    int error = refuses("gso-eio") ? EIO : refuses("gso-einval") ? EINVAL : 0;
    struct msghdr *all = (struct msghdr *)message;
    for (struct cmsghdr *c = error ? CMSG_FIRSTHDR(all) : 0; c; c = CMSG_NXTHDR(all, c)) {
        int is_train = c->cmsg_level == SOL_UDP_LEVEL && c->cmsg_type == UDP_SEGMENT_OPTION;
        if (is_train && is_over(&trains)) {
            errno = error;
            return -1;
        }
    }
    return syscall(SYS_sendmsg, fd, message, flags);
}

/* Whether the calling thread is to fail now; its name tells what it does. */
static int is_broken(const char *thread, atomic_long *seen) {
    char name[16] = "";
    prctl(PR_GET_NAME, name);
    if (!refuses("packets") || strncmp(name, thread, strlen(thread)) || !is_over(seen)) return 0;
    errno = EBADF;
    return 1;
}

int epoll_wait(int fd, struct epoll_event *events, int count, int limit) {
    static atomic_long seen;
    if (is_broken("udp-to-tun", &seen)) return -1;
    return (int)syscall(SYS_epoll_pwait, fd, events, count, limit, 0, 8);
}

int recvmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags, struct timespec *limit) {
    static atomic_long seen;
    if (is_broken("relay-", &seen)) return -1;
    return (int)syscall(SYS_recvmmsg, fd, messages, count, flags, limit);
}

int setsockopt(int fd, int level, int name, const void *value, socklen_t length) {
    int is_gso = level == SOL_UDP_LEVEL && name == UDP_SEGMENT_OPTION;
    int is_gro = level == SOL_UDP_LEVEL && name == UDP_GRO_OPTION;
    if ((is_gso && refuses("gso-probe")) || (is_gro && refuses("gro-probe"))) {
        errno = ENOPROTOOPT;
        return -1;
    }
    return (int)syscall(SYS_setsockopt, fd, level, name, value, length);
}

int ioctl(int fd, unsigned long request, ...) {
    va_list rest;
    va_start(rest, request);
    unsigned long argument = va_arg(rest, unsigned long);
    va_end(rest);
    int refused = refuses("tun-probe") || (refuses("uso-probe") && (argument & USO_BITS));
    if (request == TUNSETOFFLOAD && refused) {
        errno = EINVAL;
        return -1;
    }
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

/* A frame with its virtio header goes to a character device: the second byte is the kind of train. */
ssize_t writev(int fd, const struct iovec *pieces, int count) {
    static atomic_long trains[2];
    struct stat about;
    int tcp = refuses("tso"), udp = refuses("uso");
    if ((tcp || udp) && count > 1 && pieces->iov_len >= 10 && !fstat(fd, &about) &&
        S_ISCHR(about.st_mode)) {
        int kind = ((const unsigned char *)pieces->iov_base)[1] & 0x7f;
        if ((tcp && (kind == 1 || kind == 4) && is_over(&trains[0])) ||
            (udp && kind == 5 && is_over(&trains[1]))) {
            errno = EINVAL;
            return -1;
        }
    }
    return syscall(SYS_writev, fd, pieces, count);
}
