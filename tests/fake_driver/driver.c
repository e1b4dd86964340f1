/* A driver library for machines without a GPU: the entry points that fiddler_runtime/lanes/driver.py calls, with streams that
 * are threads of this CPU. What a stream is given happens in order, beside the caller, as on a GPU; device addresses of host
 * memory differ from its own, so that a mix-up is a crash.
 *
 * fake_ functions are the tests' handles. WITHOUT_MEMORY_OPERATIONS leaves out what old drivers lack.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713 };
enum { MOST_RANGES = 256, QUEUE = 4096 };
static const uint64_t kThere = UINT64_C(1) << 46; /* device address = host address + this */

typedef void (*host_function)(void*);
typedef struct operation {
  enum { WRITE, WAIT, CALL, STOP } kind;
  uint32_t* address;
  uint32_t value;
  host_function function;
  void* argument;
} operation;

typedef struct stream {
  int closing; /* nothing is waited for any more */
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t changed;
  operation queue[QUEUE];
  uint64_t given, done;
} stream;

typedef struct range {
  uintptr_t first;
  size_t bytes;
} range;

static pthread_mutex_t ranges_lock = PTHREAD_MUTEX_INITIALIZER;
static range ranges[MOST_RANGES];
static int range_count;
static size_t registered, lock_limit = SIZE_MAX;
static int memory_operations = 1, deaf;
static uint64_t calls[3]; /* writes, waits, host functions that were carried out */

void fake_reset(void) {
  memory_operations = 1;
  deaf = 0;
  lock_limit = SIZE_MAX;
  memset(calls, 0, sizeof calls);
}
void fake_memory_operations(int on) { memory_operations = on; }
void fake_deaf(int on) { deaf = on; } /* writes and host functions get lost */
void fake_lock_limit(size_t bytes) { lock_limit = bytes; }
size_t fake_registered(void) { return registered; }
uint64_t fake_calls(int kind) { return __atomic_load_n(&calls[kind], __ATOMIC_SEQ_CST); }

static void perform(const stream* s, const operation* op) {
  switch (op->kind) {
    case WRITE:
      if (!deaf) __atomic_store_n(op->address, op->value, __ATOMIC_SEQ_CST);
      break;
    case WAIT:
      while ((int32_t)(__atomic_load_n(op->address, __ATOMIC_ACQUIRE) - op->value) < 0 &&
             !__atomic_load_n(&s->closing, __ATOMIC_ACQUIRE))
        sched_yield();
      break;
    case CALL:
      if (!deaf) op->function(op->argument);
      break;
    case STOP: return;
  }
  __atomic_fetch_add(&calls[op->kind], 1, __ATOMIC_SEQ_CST);
}

static void* serve(void* argument) {
  stream* s = argument;
  for (;;) {
    pthread_mutex_lock(&s->lock);
    while (s->done == s->given) pthread_cond_wait(&s->changed, &s->lock);
    const operation op = s->queue[s->done % QUEUE];
    pthread_mutex_unlock(&s->lock);
    perform(s, &op);
    pthread_mutex_lock(&s->lock);
    ++s->done;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    if (op.kind == STOP) return NULL;
  }
}

static int give(stream* s, operation op) {
  if (!s) return INVALID_VALUE;
  pthread_mutex_lock(&s->lock);
  while (s->given - s->done == QUEUE) pthread_cond_wait(&s->changed, &s->lock);
  s->queue[s->given++ % QUEUE] = op;
  pthread_cond_broadcast(&s->changed);
  pthread_mutex_unlock(&s->lock);
  return SUCCESS;
}

void* fake_stream_open(void) {
  stream* s = calloc(1, sizeof *s);
  pthread_mutex_init(&s->lock, NULL);
  pthread_cond_init(&s->changed, NULL);
  pthread_create(&s->thread, NULL, serve, s);
  return s;
}

void fake_stream_synchronize(void* handle) {
  stream* s = handle;
  pthread_mutex_lock(&s->lock);
  const uint64_t until = s->given;
  while (s->done < until) pthread_cond_wait(&s->changed, &s->lock);
  pthread_mutex_unlock(&s->lock);
}

void fake_stream_close(void* handle) {
  stream* s = handle;
  __atomic_store_n(&s->closing, 1, __ATOMIC_RELEASE);
  give(s, (operation){.kind = STOP});
  pthread_join(s->thread, NULL);
  free(s);
}

/* The driver's own, as cuda.h of CUDA 13.0 declares them. */
int cuInit(unsigned flags) { return flags == 0 ? SUCCESS : INVALID_VALUE; }

int cuDriverGetVersion(int* version) {
  *version = 12040;
  return SUCCESS;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? SUCCESS : INVALID_VALUE;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device != 0 || attribute != 122) return INVALID_VALUE;
  *value = memory_operations;
  return SUCCESS;
}

int cuGetErrorString(int error, const char** text) {
  switch (error) {
    case SUCCESS: *text = "no error"; return SUCCESS;
    case OUT_OF_MEMORY: *text = "out of memory"; return SUCCESS;
    case ALREADY_REGISTERED: *text = "part or all of the requested memory range is already mapped"; return SUCCESS;
    case NOT_REGISTERED: *text = "pointer does not correspond to a registered memory region"; return SUCCESS;
    default: *text = "invalid argument"; return SUCCESS;
  }
}

int cuMemHostRegister_v2(void* address, size_t bytes, unsigned flags) {
  if (!address || bytes == 0 || flags > 3) return INVALID_VALUE;
  const uintptr_t first = (uintptr_t)address;
  int status = SUCCESS;
  pthread_mutex_lock(&ranges_lock);
  for (int i = 0; i < range_count; ++i)
    if (first < ranges[i].first + ranges[i].bytes && ranges[i].first < first + bytes) status = ALREADY_REGISTERED;
  if (status == SUCCESS && (registered + bytes > lock_limit || range_count == MOST_RANGES)) status = OUT_OF_MEMORY;
  if (status == SUCCESS) {
    ranges[range_count++] = (range){first, bytes};
    registered += bytes;
  }
  pthread_mutex_unlock(&ranges_lock);
  return status;
}

int cuMemHostUnregister(void* address) {
  int status = NOT_REGISTERED;
  pthread_mutex_lock(&ranges_lock);
  for (int i = 0; i < range_count; ++i) {
    if (ranges[i].first != (uintptr_t)address) continue;
    registered -= ranges[i].bytes;
    ranges[i] = ranges[--range_count];
    status = SUCCESS;
    break;
  }
  pthread_mutex_unlock(&ranges_lock);
  return status;
}

static uint32_t* mapped(uint64_t address) {
  const uintptr_t host = (uintptr_t)(address - kThere);
  uint32_t* found = NULL;
  pthread_mutex_lock(&ranges_lock);
  for (int i = 0; i < range_count; ++i)
    if (host >= ranges[i].first && host + sizeof(uint32_t) <= ranges[i].first + ranges[i].bytes && host % 4 == 0)
      found = (uint32_t*)host;
  pthread_mutex_unlock(&ranges_lock);
  return found;
}

int cuMemHostGetDevicePointer_v2(uint64_t* there, void* address, unsigned flags) {
  *there = (uint64_t)(uintptr_t)address + kThere;
  return flags == 0 && mapped(*there) ? SUCCESS : INVALID_VALUE;
}

int cuLaunchHostFunc(void* s, host_function function, void* argument) {
  if (!function) return INVALID_VALUE;
  return give(s, (operation){.kind = CALL, .function = function, .argument = argument});
}

#ifndef WITHOUT_MEMORY_OPERATIONS
int cuStreamWriteValue32_v2(void* s, uint64_t address, uint32_t value, unsigned flags) {
  uint32_t* host = mapped(address);
  if (!host || flags != 0) return INVALID_VALUE;
  return give(s, (operation){.kind = WRITE, .address = host, .value = value});
}

int cuStreamWaitValue32_v2(void* s, uint64_t address, uint32_t value, unsigned flags) {
  uint32_t* host = mapped(address);
  if (!host || flags != 0) return INVALID_VALUE;
  return give(s, (operation){.kind = WAIT, .address = host, .value = value});
}
#endif
