/* Load generator and echo pair for scripts/bench serving: small, so that it is never what is measured.
 *
 *   load ask  (--unix PATH | --tcp PORT) --request FILE --connections N --seconds S
 *             [--count N] [--rate R] [--answer-bytes N] [--cpu C] [--stop-file PATH]
 *   load echo --unix PATH --request-bytes N --answer FILE [--cpu C]
 *
 * `ask` sends the bytes of FILE again and again on keep-alive connections and prints one JSON line. Without --rate
 * each connection asks again as soon as it is answered; with it, requests begin at R a second whatever happens to
 * those before (open loop): one that finds no idle connection waits for one, and its latency counts from when it was
 * due. Every answer's status and length are checked; an answer with status 200 and another length than
 * --answer-bytes is an error. A connection that is cut counts as a reset, once, and is opened anew; one that the
 * server announced to close (Connection: close) is opened anew and counted as `reopened`.
 * `echo` answers every N bytes with the bytes of FILE: the floor of any server in any language.
 * Latencies go to a histogram of 1/64 relative resolution.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNECTIONS 4096
#define MAX_WAITING 65536
#define BUFFER (1 << 20)
#define SUB 64
#define BUCKETS (40 * SUB)

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
  fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
  exit(2);
}

static char *read_file(const char *path, size_t *size) {
  FILE *file = fopen(path, "rb");
  if (!file) die(path);
  fseek(file, 0, SEEK_END);
  *size = (size_t)ftell(file);
  rewind(file);
  char *bytes = malloc(*size + 1);
  if (!bytes || fread(bytes, 1, *size, file) != *size) die(path);
  bytes[*size] = 0;
  fclose(file);
  return bytes;
}

static void pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  if (sched_setaffinity(0, sizeof set, &set)) die("cannot pin");
}

/* --- histogram ---------------------------------------------------------------------------------------------- */
static uint64_t buckets[BUCKETS], counted, largest_ns;

static unsigned bucket_of(uint64_t ns) {
  if (ns < SUB) return (unsigned)ns;
  unsigned shift = 63u - (unsigned)__builtin_clzll(ns) - 6u;
  unsigned index = (shift + 1) * SUB + (unsigned)((ns >> shift) - SUB);
  return index < BUCKETS ? index : BUCKETS - 1;
}

static double value_of(unsigned index) {
  if (index < SUB) return index;
  unsigned shift = index / SUB - 1;
  return (double)((uint64_t)(SUB + index % SUB) << shift) + (double)(1ull << shift) / 2;
}

static void note(uint64_t ns) {
  buckets[bucket_of(ns)]++;
  counted++;
  if (ns > largest_ns) largest_ns = ns;
}

static double percentile_us(double share) {
  uint64_t rank = (uint64_t)(share * (double)counted), seen = 0;
  for (unsigned i = 0; i < BUCKETS; i++) {
    seen += buckets[i];
    if (seen > rank) return value_of(i) / 1e3;
  }
  return counted ? (double)largest_ns / 1e3 : 0;
}

/* --- asking --------------------------------------------------------------------------------------------------- */
typedef struct {
  int fd;
  bool busy, parsed, closing;
  int status;
  size_t sent, have, need; /* need: bytes of the whole answer once its head is parsed */
  uint64_t due_ns;
  uint32_t events;
  char *buffer;
} Connection;

static const char *unix_path;
static int tcp_port, epoll_fd, connections = 1;
static char *request;
static size_t request_bytes, answer_bytes;
static uint64_t begun, ok, refused, errors, resets, reopened, by_status[600], unsent;
static Connection table[MAX_CONNECTIONS];
static uint64_t waiting[MAX_WAITING]; /* due times of open-loop requests without a connection */
static size_t waiting_first, waiting_count;

static void open_connection(Connection *c) {
  for (int attempt = 0;; attempt++) {
    if (unix_path) {
      struct sockaddr_un address = {.sun_family = AF_UNIX};
      strncpy(address.sun_path, unix_path, sizeof address.sun_path - 1);
      c->fd = socket(AF_UNIX, SOCK_STREAM, 0);
      if (c->fd >= 0 && !connect(c->fd, (struct sockaddr *)&address, sizeof address)) break;
    } else {
      struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)tcp_port)};
      address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
      c->fd = socket(AF_INET, SOCK_STREAM, 0);
      int one = 1;
      setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
      if (c->fd >= 0 && !connect(c->fd, (struct sockaddr *)&address, sizeof address)) break;
    }
    if (c->fd >= 0) close(c->fd);
    if (attempt > 2000) die("cannot connect");
    usleep(5000);
  }
  fcntl(c->fd, F_SETFL, O_NONBLOCK);
  c->busy = c->parsed = c->closing = false;
  c->sent = c->have = c->need = 0;
  c->events = EPOLLIN;
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
  if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event)) die("epoll_ctl");
}

static void want(Connection *c, uint32_t events) {
  if (c->events == events) return;
  c->events = events;
  struct epoll_event event = {.events = events, .data.ptr = c};
  epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
}

static void reopen(Connection *c, bool announced) {
  bool again = c->busy;
  uint64_t due_ns = c->due_ns;
  close(c->fd);
  if (announced) reopened++;
  else resets++;
  open_connection(c);
  if (again) { /* unanswered: asked again, and its latency goes on */
    c->busy = true;
    c->due_ns = due_ns;
  }
}

/* false: the connection broke */
static bool push(Connection *c) {
  while (c->sent < request_bytes) {
    ssize_t n = send(c->fd, request + c->sent, request_bytes - c->sent, MSG_NOSIGNAL);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      want(c, EPOLLIN | EPOLLOUT);
      return true;
    }
    if (n <= 0) return false;
    c->sent += (size_t)n;
  }
  want(c, EPOLLIN);
  return true;
}

static void begin(Connection *c, uint64_t due_ns) {
  c->busy = true;
  c->parsed = c->closing = false;
  c->sent = c->have = c->need = 0;
  c->due_ns = due_ns;
  begun++;
  for (int attempt = 0; !push(c) && attempt < 100; attempt++) reopen(c, false);
}

static bool parse_head(Connection *c) {
  c->buffer[c->have] = 0;
  char *end = strstr(c->buffer, "\r\n\r\n");
  if (!end) return true;
  if (c->have < 12 || strncmp(c->buffer, "HTTP/1.", 7)) return false;
  c->status = atoi(c->buffer + 9);
  char kept = *end;
  *end = 0;
  char *length = strcasestr(c->buffer, "\r\ncontent-length:");
  c->closing = strcasestr(c->buffer, "\r\nconnection: close") != NULL;
  size_t body = length ? strtoul(length + 17, NULL, 10) : 0;
  bool chunked = !length && strcasestr(c->buffer, "\r\ntransfer-encoding:");
  *end = kept;
  if (chunked) return false;
  c->need = (size_t)(end - c->buffer) + 4 + body;
  c->parsed = true;
  return c->status > 99 && c->status < 600;
}

static void answered(Connection *c, uint64_t at_ns) {
  by_status[c->status]++;
  if (c->status == 200 && (!answer_bytes || c->need == answer_bytes)) {
    ok++;
    note(at_ns - c->due_ns);
  } else if (c->status == 503 || c->status == 429) refused++;
  else errors++;
  c->busy = false;
  if (c->closing) reopen(c, true);
}

/* What arrived; false: the connection broke. */
static bool pull(Connection *c) {
  for (;;) {
    size_t room = c->parsed && c->need > BUFFER ? BUFFER : BUFFER - 1 - c->have;
    char *at = c->parsed && c->need > BUFFER ? c->buffer : c->buffer + c->have;
    ssize_t n = recv(c->fd, at, room, 0);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return true;
    if (n <= 0) return false;
    if (!c->busy) return false; /* nobody asked */
    c->have += (size_t)n;
    if (!c->parsed && !parse_head(c)) {
      errors++;
      c->busy = false;
      return false;
    }
    if (c->parsed && c->have >= c->need) {
      if (c->have > c->need) errors++;
      answered(c, now_ns());
      return true;
    }
  }
}

static double cpu_s(void) {
  struct rusage used;
  getrusage(RUSAGE_SELF, &used);
  return (double)used.ru_utime.tv_sec + (double)used.ru_stime.tv_sec +
         (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static int ask(double seconds, uint64_t count, double rate, const char *stop_file) {
  epoll_fd = epoll_create1(0);
  for (int i = 0; i < connections; i++) {
    table[i].buffer = malloc(BUFFER + 1);
    open_connection(&table[i]);
  }
  uint64_t start = now_ns(), end = start + (uint64_t)(seconds * 1e9), checked = start;
  uint64_t planned = 0;
  double used = cpu_s();
  if (rate <= 0)
    for (int i = 0; i < connections && (!count || begun < count); i++) begin(&table[i], now_ns());
  struct epoll_event events[256];
  bool ending = false;
  uint64_t grace = 0;
  for (;;) {
    uint64_t now = now_ns();
    if (!ending && (now >= end || (count && begun >= count))) ending = true, grace = now + 20000000000ull;
    if (stop_file && now - checked > 50000000u) {
      checked = now;
      if (!access(stop_file, F_OK)) ending = true, grace = grace ? grace : now + 20000000000ull;
    }
    if (rate > 0 && !ending) {
      uint64_t due = start + (uint64_t)((double)planned * 1e9 / rate);
      while (due <= now) {
        if (waiting_count < MAX_WAITING)
          waiting[(waiting_first + waiting_count++) % MAX_WAITING] = due;
        else unsent++;
        due = start + (uint64_t)((double)++planned * 1e9 / rate);
      }
      for (int i = 0; i < connections && waiting_count; i++)
        if (!table[i].busy) {
          begin(&table[i], waiting[waiting_first]);
          waiting_first = (waiting_first + 1) % MAX_WAITING;
          waiting_count--;
        }
    }
    if (ending) {
      bool busy = false;
      for (int i = 0; i < connections; i++) busy |= table[i].busy;
      if (!busy || now > grace) break;
    }
    int wait_ms = rate > 0 && !ending ? 1 : 50;
    int found = epoll_wait(epoll_fd, events, 256, wait_ms);
    for (int i = 0; i < found; i++) {
      Connection *c = events[i].data.ptr;
      bool sound = true;
      if (events[i].events & EPOLLOUT) sound = push(c);
      if (sound && (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))) sound = pull(c);
      if (!sound) {
        reopen(c, false);
        if (c->busy) {
          c->sent = c->have = c->need = 0;
          c->parsed = false;
          push(c);
        }
      }
      if (!c->busy && !ending && rate <= 0 && (!count || begun < count)) begin(c, now_ns());
    }
  }
  double took = (double)(now_ns() - start) / 1e9;
  uint64_t lost = 0;
  for (int i = 0; i < connections; i++) lost += table[i].busy;
  printf("{\"requests\": %lu, \"ok\": %lu, \"refused\": %lu, \"errors\": %lu, \"resets\": %lu, \"reopened\": %lu, "
         "\"unanswered\": %lu, \"unsent\": %lu, \"seconds\": %.6f, \"rate\": %.2f, \"p50_us\": %.2f, \"p90_us\": %.2f, "
         "\"p99_us\": %.2f, \"p999_us\": %.2f, \"max_us\": %.2f, \"client_cpu_s\": %.6f, \"statuses\": {",
         begun, ok, refused, errors, resets, reopened, lost, unsent + waiting_count, took, (double)ok / took,
         percentile_us(.5), percentile_us(.9), percentile_us(.99), percentile_us(.999), (double)largest_ns / 1e3,
         cpu_s() - used);
  bool first = true;
  for (int s = 0; s < 600; s++)
    if (by_status[s]) printf("%s\"%d\": %lu", first ? "" : ", ", s, by_status[s]), first = false;
  printf("}}\n");
  return 0;
}

/* --- echo ------------------------------------------------------------------------------------------------------ */
_Noreturn static void echo(const char *path, size_t expected, const char *answer, size_t size) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  strncpy(address.sun_path, path, sizeof address.sun_path - 1);
  unlink(path);
  int listener = socket(AF_UNIX, SOCK_STREAM, 0);
  if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16)) die("cannot listen");
  char *buffer = malloc(expected);
  for (;;) {
    int fd = accept(listener, NULL, NULL);
    if (fd < 0) die("accept");
    for (size_t have = 0;;) {
      ssize_t n = recv(fd, buffer + have, expected - have, 0);
      if (n <= 0) break;
      if ((have += (size_t)n) < expected) continue;
      have = 0;
      for (size_t sent = 0; sent < size;) {
        ssize_t m = send(fd, answer + sent, size - sent, MSG_NOSIGNAL);
        if (m <= 0) break;
        sent += (size_t)m;
      }
    }
    close(fd);
  }
}

int main(int argc, char **argv) {
  const char *request_file = NULL, *answer_file = NULL, *stop_file = NULL;
  double seconds = 1, rate = 0;
  uint64_t count = 0;
  size_t expected = 0;
  bool echoes = argc > 1 && !strcmp(argv[1], "echo");
  if (argc < 2 || (!echoes && strcmp(argv[1], "ask"))) return fprintf(stderr, "load: ask or echo?\n"), 2;
  for (int i = 2; i + 1 < argc; i += 2) {
    const char *name = argv[i], *value = argv[i + 1];
    if (!strcmp(name, "--unix")) unix_path = value;
    else if (!strcmp(name, "--tcp")) tcp_port = atoi(value);
    else if (!strcmp(name, "--request")) request_file = value;
    else if (!strcmp(name, "--answer")) answer_file = value;
    else if (!strcmp(name, "--request-bytes")) expected = strtoul(value, NULL, 10);
    else if (!strcmp(name, "--answer-bytes")) answer_bytes = strtoul(value, NULL, 10);
    else if (!strcmp(name, "--connections")) connections = atoi(value);
    else if (!strcmp(name, "--seconds")) seconds = atof(value);
    else if (!strcmp(name, "--count")) count = strtoull(value, NULL, 10);
    else if (!strcmp(name, "--rate")) rate = atof(value);
    else if (!strcmp(name, "--stop-file")) stop_file = value;
    else if (!strcmp(name, "--cpu")) pin(atoi(value));
    else return fprintf(stderr, "load: unknown option %s\n", name), 2;
  }
  if (connections < 1 || connections > MAX_CONNECTIONS) return fprintf(stderr, "load: 1 to 4096 connections\n"), 2;
  if (echoes) {
    size_t size;
    char *answer = read_file(answer_file, &size);
    echo(unix_path, expected, answer, size);
  }
  request = read_file(request_file, &request_bytes);
  return ask(seconds, count, rate, stop_file);
}
