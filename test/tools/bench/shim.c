/* Preloaded into the C program: no Nagle delay on its sockets, a long listen queue. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/socket.h>

#define NEXT(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))

static int no_delay(int fd)
{
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    return fd;
}

int accept(int fd, struct sockaddr *peer, socklen_t *size)
{
    return no_delay(NEXT(accept)(fd, peer, size));
}

int connect(int fd, const struct sockaddr *peer, socklen_t size)
{
    return NEXT(connect)(no_delay(fd), peer, size);
}

int listen(int fd, int queue)
{
    (void) queue;
    return NEXT(listen)(fd, 1024);
}

/* The filters are not to be slowed down by the preloading. */
__attribute__((constructor)) static void leave_children_alone(void)
{
    unsetenv("LD_PRELOAD");
}
