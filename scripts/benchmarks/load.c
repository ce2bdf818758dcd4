/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The load that scripts/bench puts on a server, and the least that a server can do. Built at run time.
 *
 *   load qmp SOCKET OP SECONDS WINDOW CONNECTIONS [KEY=VALUE...]
 *       OP: version | pair | aes | fd | read | add | del | cycle
 *       pair and aes are an object-add and an object-del; add and del the one and the other alone, of COUNT objects
 *       from number FROM on; cycle adds one, reads it and deletes the one of KEEP cycles ago, sizes from 1 byte to
 *       1 MiB; fd a getfd and a closefd; read a secret-read into a pipe that is made for it
 *       SIZE=bytes of a secret, COUNT=requests at most, FROM=first number
 *   load gpg SOCKET SECONDS            GET_PASSPHRASE of a cached one
 *   load libvirt URI UUID SECONDS      virSecretGetValue, by libvirt.so.0
 *   load serve SOCKET                  an epoll server that answers any request at once and writes 32 bytes to a
 *                                      descriptor that comes with it
 *
 * Prints one line of JSON: {"ops": N, "seconds": S, "p50": µs, "p99": µs}. For pair and aes the percentiles are of the
 * object-add alone.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MESSAGE (64 << 10)
#define SAMPLES (1 << 20)

static double *samples;
static long sampled;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void sample(double seconds)
{
    if (sampled < SAMPLES)
        samples[sampled++] = seconds * 1e6;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void report(long ops, double seconds)
{
    qsort(samples, sampled, sizeof *samples, by_size);
    printf("{\"ops\": %ld, \"seconds\": %.6f, \"p50\": %.2f, \"p99\": %.2f}\n", ops, seconds,
           sampled ? samples[sampled / 2] : 0, sampled ? samples[sampled * 99 / 100] : 0);
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        die(path);
    return fd;
}

static void send_all(int fd, const char *data, size_t size)
{
    while (size) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
        if (sent < 0)
            die("send");
        data += sent;
        size -= sent;
    }
}

static void send_fd(int fd, const char *data, size_t size, int passed)
{
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec part = {(void *)data, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &passed, sizeof passed);
    if (sendmsg(fd, &message, MSG_NOSIGNAL) != (ssize_t)size)
        die("sendmsg");
}

/* Read until so many lines have come; events do not count. */
static void lines(int fd, int wanted)
{
    static char data[1 << 20];
    static char begin[64];
    size_t kept = 0;
    while (wanted > 0) {
        ssize_t got = recv(fd, data, sizeof data, 0);
        if (got <= 0)
            die("recv");
        for (char *at = data, *end = data + got; at < end;) {
            char *newline = memchr(at, '\n', end - at);
            size_t size = (newline ? newline : end) - at, room = sizeof begin - 1 - kept;
            memcpy(begin + kept, at, size < room ? size : room);
            kept += size < room ? size : room;
            begin[kept] = 0;
            if (!newline)
                break;
            if (strncmp(begin, "{\"timestamp\"", 12) != 0) {
                if (strstr(begin, "\"error\"")) {
                    fprintf(stderr, "%.*s\n", (int)(newline - at), at);
                    exit(1);
                }
                wanted--;
            }
            kept = 0;
            at = newline + 1;
        }
    }
}

static int session(const char *path)
{
    int fd = connect_to(path);
    const char *words = "{\"execute\":\"qmp_capabilities\"}\n";
    lines(fd, 1);
    send_all(fd, words, strlen(words));
    lines(fd, 1);
    return fd;
}

static long option(char **argv, const char *name, long otherwise)
{
    size_t size = strlen(name);
    for (; *argv; argv++)
        if (strncmp(*argv, name, size) == 0 && (*argv)[size] == '=')
            return atol(*argv + size + 1);
    return otherwise;
}

static const char *text(char **argv, const char *name)
{
    size_t size = strlen(name);
    for (; *argv; argv++)
        if (strncmp(*argv, name, size) == 0 && (*argv)[size] == '=')
            return *argv + size + 1;
    return "";
}

static char secret[MESSAGE];
static const char *sealed, *iv;

static size_t add_words(char *to, long number, int aes)
{
    if (aes)
        return sprintf(to,
                       "{\"execute\":\"object-add\",\"arguments\":{\"qom-type\":\"secret\",\"id\":\"b%ld\",\"data\":\"%s\","
                       "\"format\":\"base64\",\"keyid\":\"master\",\"iv\":\"%s\"}}\n", number, sealed, iv);
    return sprintf(to, "{\"execute\":\"object-add\",\"arguments\":{\"qom-type\":\"secret\",\"id\":\"b%ld\",\"data\":\"%s\"}}\n",
                   number, secret);
}

static size_t del_words(char *to, long number)
{
    return sprintf(to, "{\"execute\":\"object-del\",\"arguments\":{\"id\":\"b%ld\"}}\n", number);
}

/* One operation, one request after the other. */
static void once(int fd, const char *op, long number)
{
    static char words[MESSAGE + 1024];
    static const char version[] = "{\"execute\":\"query-version\"}\n";
    static const char getfd[] = "{\"execute\":\"getfd\",\"arguments\":{\"fdname\":\"x\"}}\n";
    static const char closefd[] = "{\"execute\":\"closefd\",\"arguments\":{\"fdname\":\"x\"}}\n";
    static const char read_[] = "{\"execute\":\"secret-read\",\"arguments\":{\"id\":\"held\"}}\n";
    double began = now();
    if (strcmp(op, "version") == 0) {
        send_all(fd, version, sizeof version - 1);
        lines(fd, 1);
        sample(now() - began);
    } else if (strcmp(op, "fd") == 0) {
        send_fd(fd, getfd, sizeof getfd - 1, 0);
        lines(fd, 1);
        send_all(fd, closefd, sizeof closefd - 1);
        lines(fd, 1);
        sample(now() - began);
    } else if (strcmp(op, "read") == 0) {
        int ends[2];
        char data[4096];
        if (pipe2(ends, O_CLOEXEC) < 0)
            die("pipe2");
        send_fd(fd, read_, sizeof read_ - 1, ends[1]);
        close(ends[1]);
        while (read(ends[0], data, sizeof data) > 0)
            ;
        close(ends[0]);
        lines(fd, 1);
        sample(now() - began);
    } else {
        if (strcmp(op, "del") != 0) {
            send_all(fd, words, add_words(words, number, strcmp(op, "aes") == 0));
            lines(fd, 1);
            sample(now() - began);
        }
        if (strcmp(op, "add") != 0) {
            began = now();
            send_all(fd, words, del_words(words, number));
            lines(fd, 1);
            if (strcmp(op, "del") == 0)
                sample(now() - began);
        }
    }
}

/* Operations in windows of so many requests. */
static void window_of(int fd, const char *op, long number, int window)
{
    static char *words;
    size_t size = 0;
    int aes = strcmp(op, "aes") == 0, pairs = aes || strcmp(op, "pair") == 0;
    if (!words && !(words = malloc((size_t)(window + 1) * (MESSAGE + 1024))))
        die("malloc");
    for (int each = 0; each < window; each++)
        if (pairs)
            size += each % 2 ? del_words(words + size, number + each / 2) : add_words(words + size, number + each / 2, aes);
        else if (strcmp(op, "add") == 0)
            size += add_words(words + size, number + each, 0);
        else
            size += del_words(words + size, number + each);
    send_all(fd, words, size);
    lines(fd, window);
}

/* Many connections, each with one request at a time. */
static void crowd(const char *path, const char *op, double seconds, int connections)
{
    struct pollfd *polled = calloc(connections, sizeof *polled);
    double *began = calloc(connections, sizeof *began), start = now(), end = start + seconds;
    long *number = calloc(connections, sizeof *number), ops = 0;
    char *adding = calloc(connections, 1), data[4096];
    static char words[MESSAGE + 1024];
    int version = strcmp(op, "version") == 0;
    for (int each = 0; each < connections; each++) {
        polled[each].fd = session(path);
        polled[each].events = POLLIN;
        number[each] = (long)each * 10000000;
    }
    start = now();
    end = start + seconds;
    for (int each = 0; each < connections; each++) {
        size_t size = version ? (size_t)sprintf(words, "{\"execute\":\"query-version\"}\n") : add_words(words, number[each], 0);
        began[each] = now();
        adding[each] = 1;
        send_all(polled[each].fd, words, size);
    }
    while (now() < end) {
        if (poll(polled, connections, 1000) < 0)
            die("poll");
        for (int each = 0; each < connections; each++) {
            size_t size;
            ssize_t got;
            int replies = 0;
            if (!polled[each].revents)
                continue;
            got = recv(polled[each].fd, data, sizeof data, 0);
            if (got <= 0)
                die("recv");
            for (char *at = data; at < data + got; at++)
                if (*at == '\n' && at > data)
                    replies++;
            /* events about what others do come here, too: they have "event" in them */
            if (memmem(data, got, "\"return\"", 8) == NULL)
                continue;
            sample(now() - began[each]);
            if (!adding[each] || version)
                ops++;
            adding[each] = !adding[each];
            if (version)
                size = sprintf(words, "{\"execute\":\"query-version\"}\n");
            else if (adding[each])
                size = add_words(words, ++number[each], 0);
            else
                size = del_words(words, number[each]);
            began[each] = now();
            send_all(polled[each].fd, words, size);
        }
    }
    report(ops, now() - start);
}

/* Sizes of all kinds, the small ones most often. */
static long mixed(long number)
{
    if (number % 5000 == 2500)
        return 1 << 20;
    if (number % 500 == 250)
        return 60000 + number % 7000;
    if (number % 20 == 10)
        return 3000 + number % 2000;
    return 1 + number * 7 % 256;
}

static void cycle(int fd, long from, long count, long keep)
{
    static char words[(1 << 20) + 4096], content[(1 << 20) + 1];
    int memfd = memfd_create("cycle", MFD_CLOEXEC);
    double began = now();
    memset(content, 'x', 1 << 20);
    for (long number = from; number < from + count; number++) {
        int wanted = 2;
        size_t size = sprintf(words, "{\"execute\":\"object-add\",\"arguments\":{\"qom-type\":\"secret\",\"id\":\"c%ld\","
                                     "\"data\":\"%.*s\"}}\n", number, (int)mixed(number), content);
        size += sprintf(words + size, "{\"execute\":\"secret-read\",\"arguments\":{\"id\":\"c%ld\"}}\n", number);
        if (number >= keep) {
            size += sprintf(words + size, "{\"execute\":\"object-del\",\"arguments\":{\"id\":\"c%ld\"}}\n", number - keep);
            wanted++;
        }
        if (size > 100000) { /* the descriptor must come with what the read is in */
            size_t first = size - 200;
            send_all(fd, words, first);
            send_fd(fd, words + first, size - first, memfd);
        } else {
            send_fd(fd, words, size, memfd);
        }
        lines(fd, wanted);
    }
    report(count, now() - began);
}

static void qmp(char **argv)
{
    const char *path = argv[0], *op = argv[1];
    double seconds = atof(argv[2]), start, end;
    int window = atoi(argv[3]), connections = atoi(argv[4]);
    long size = option(argv + 5, "SIZE", 32), count = option(argv + 5, "COUNT", 1L << 60), from = option(argv + 5, "FROM", 0);
    long ops = 0;
    int fd;
    sealed = text(argv + 5, "DATA");
    iv = text(argv + 5, "IV");
    memset(secret, 'x', size);
    if (connections > 1) {
        crowd(path, op, seconds, connections);
        return;
    }
    fd = session(path);
    if (strcmp(op, "cycle") == 0) {
        cycle(fd, from, count, option(argv + 5, "KEEP", 1000));
        return;
    }
    start = now();
    end = start + seconds;
    while (ops < count && now() < end) {
        if (window == 1) {
            once(fd, op, from + ops);
            ops++;
        } else {
            int some = window < count - ops ? window : (int)(count - ops);
            window_of(fd, op, from + ops, some);
            ops += strcmp(op, "pair") == 0 || strcmp(op, "aes") == 0 ? some / 2 : some;
        }
    }
    report(ops, now() - start);
}

static void gpg(char **argv)
{
    const char *words = "GET_PASSPHRASE --data --no-ask secretd-bench X X X\n";
    double seconds = atof(argv[1]), start, end;
    char data[4096];
    long ops = 0;
    int fd = connect_to(argv[0]);
    if (recv(fd, data, sizeof data, 0) <= 0)
        die("recv");
    start = now();
    end = start + seconds;
    while (now() < end) {
        double began = now();
        ssize_t size = 0;
        send_all(fd, words, strlen(words));
        do {
            ssize_t got = recv(fd, data + size, sizeof data - size - 1, 0);
            if (got <= 0)
                die("recv");
            size += got;
            data[size] = 0;
        } while (!strstr(data, "OK") && !strstr(data, "ERR"));
        if (strstr(data, "ERR")) {
            fputs(data, stderr);
            exit(1);
        }
        sample(now() - began);
        ops++;
    }
    report(ops, now() - start);
}

static void libvirt(char **argv)
{
    void *library = dlopen("libvirt.so.0", RTLD_NOW);
    double seconds = atof(argv[2]), start, end;
    long ops = 0;
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        exit(3);
    }
    void *(*open_)(const char *) = dlsym(library, "virConnectOpen");
    void *(*lookup)(void *, const char *) = dlsym(library, "virSecretLookupByUUIDString");
    unsigned char *(*get)(void *, size_t *, unsigned) = dlsym(library, "virSecretGetValue");
    void *connection = open_(argv[0]), *found = connection ? lookup(connection, argv[1]) : NULL;
    if (!found)
        exit(1);
    start = now();
    end = start + seconds;
    while (now() < end) {
        double began = now();
        size_t size;
        unsigned char *value = get(found, &size, 0);
        if (!value)
            exit(1);
        free(value);
        sample(now() - began);
        ops++;
    }
    report(ops, now() - start);
}

/* Bytes of one line of secretd's audit. */
enum { RECORD = 330 };

/* The least that a server can do: secretd's system calls for a request, and nothing else. */
static void serve(const char *path, const char *audit)
{
    static const char greeting[] = "{\"QMP\": {}}\r\n", reply[] = "{\"return\": {\"size\": 32}}\r\n";
    static char records[128 * RECORD];
    int log = audit ? open(audit, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600) : -1;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), poller = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener};
    char content[32];
    memset(content, 'x', sizeof content);
    memset(records, 'x', sizeof records);
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 100) < 0)
        die(path);
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int count = epoll_wait(poller, &event, 1, -1);
        if (count < 1)
            continue;
        if (event.data.fd == listener) {
            int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
            struct epoll_event added = {.events = EPOLLIN, .data.fd = fd};
            send(fd, greeting, sizeof greeting - 1, MSG_NOSIGNAL);
            epoll_ctl(poller, EPOLL_CTL_ADD, fd, &added);
            continue;
        }
        char data[65536], control[CMSG_SPACE(253 * sizeof(int))];
        struct iovec part = {data, sizeof data};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        ssize_t got = recvmsg(event.data.fd, &message, MSG_CMSG_CLOEXEC);
        if (got <= 0) {
            close(event.data.fd);
            continue;
        }
        size_t requests = 0, size = 0;
        for (char *at = data; (at = memchr(at, '\n', data + got - at)); at++)
            requests++;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        if (header && header->cmsg_type == SCM_RIGHTS) {
            int passed;
            struct statx status;
            memcpy(&passed, CMSG_DATA(header), sizeof passed);
            fcntl(passed, F_GETFL);
            statx(passed, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE | STATX_NLINK, &status);
            if (write(passed, content, sizeof content) < 0)
                perror("write");
            close(passed);
        }
        size_t noted = requests < 128 ? requests : 128;
        if (log >= 0 && !memmem(data, got, "query-", 6) && write(log, records, noted * RECORD) < 0)
            perror("write");
        for (; requests; requests--, size += sizeof reply - 1)
            memcpy(data + size, reply, sizeof reply - 1);
        send(event.data.fd, data, size, MSG_NOSIGNAL);
    }
}

int main(int argc, char **argv)
{
    samples = malloc(SAMPLES * sizeof *samples);
    if (argc > 6 && strcmp(argv[1], "qmp") == 0)
        qmp(argv + 2);
    else if (argc > 3 && strcmp(argv[1], "gpg") == 0)
        gpg(argv + 2);
    else if (argc > 4 && strcmp(argv[1], "libvirt") == 0)
        libvirt(argv + 2);
    else if (argc > 2 && strcmp(argv[1], "serve") == 0)
        serve(argv[2], argv[3]);
    else
        return 2;
    return 0;
}
