/* The C interface of a generated kernel library: plain pointers, no C++ and no torch types cross it.
 *
 * Every function is safe to call on any x86-64 CPU; those that need an instruction set check for it first.
 * Functions returning int32_t give FDL_OK or a negative FDL_E_ code; fdl_error_text() words it.
 * bf16 values travel as uint16_t.
 */
#ifndef FIDDLER_ABI_H
#define FIDDLER_ABI_H

#include <stddef.h>
#include <stdint.h>

#define FDL_ABI_VERSION 7

#ifdef __cplusplus
extern "C" {
#endif

enum fdl_status {
  FDL_OK = 0,
  FDL_E_ISA = -1,       /* no variant in this library runs on this CPU, or the one asked for does not */
  FDL_E_ARGUMENT = -2,  /* a pointer is null or a size is out of range */
  FDL_E_MEMORY = -3,    /* an allocation failed */
  FDL_E_THREAD = -4,    /* a worker thread could not be started */
  FDL_E_STALL = -5,     /* a step made no progress and was given up */
  FDL_E_PLACE = -6      /* memory is not on the node where it belongs */
};

/* How one expert of one layer is executed in one step. */
enum fdl_strategy {
  FDL_IDLE = 0,     /* no token chose it */
  FDL_RESIDENT = 1, /* (a) its weights are on the accelerator */
  FDL_STREAMED = 2, /* (b) its weights are copied to the accelerator for this step */
  FDL_CPU = 3,      /* (c) its tokens are computed on the CPU */
  FDL_SPLIT = 4     /* its first intermediate rows as (b), the others as (c) */
};

typedef struct fdl_kernels fdl_kernels; /* one kernel variant and its thread pool */

/* The latency tables of one plan, in microseconds. cpu_us[n] and gpu_us[n] for n tokens, 0 <= n < length;
 * beyond, the line through the last two entries continues. */
typedef struct fdl_tables {
  const float* cpu_us;
  const float* gpu_us;
  int32_t length;
  float cpu_overhead_us; /* c0: entering the CPU lane once per layer */
  float gpu_overhead_us; /* g0: entering the accelerator lanes once per layer */
  float stream_us;       /* w: copying one expert's weights */
  float contention;      /* gamma: relative slow-down of the CPU lane while copies run */
  int32_t rows;          /* intermediate rows of an expert where one of a layer may be split; 0: none is */
} fdl_tables;

/* The CPU share of one MoE layer.
 * hidden        bf16 [tokens][hidden_size], rows hidden_stride elements apart
 * topk_ids      int64 [tokens][top_k], contiguous; ids outside [0, num_experts) are skipped
 * topk_weights  fp32 [tokens][top_k], contiguous
 * strategy      uint8 [num_experts]; experts marked FDL_CPU or FDL_SPLIT are computed. NULL: all are
 * split_rows    of experts marked FDL_SPLIT, the first so many intermediate rows (a multiple of 64) are left out
 * experts       [num_experts] packed weights, 64-byte aligned; only those computed are read
 * out           fp32 [tokens][hidden_size], contiguous; every row is overwritten
 */
typedef struct fdl_moe_call {
  const uint16_t* hidden;
  int64_t hidden_stride;
  const int64_t* topk_ids;
  const float* topk_weights;
  const uint8_t* strategy;
  const uint16_t* const* experts;
  float* out;
  int64_t tokens;
  int32_t top_k;
  int32_t num_experts;
  int32_t split_rows;
} fdl_moe_call;

/* What the library is. */
int32_t fdl_abi_version(void);
const char* fdl_describe(void); /* JSON: {"name", "hidden_size", "intermediate_size", "activation", "bias", "isas", "symbols"} */
const char* fdl_error_text(int32_t status);
int64_t fdl_packed_bytes(void);         /* of one expert, a multiple of 64 */
int32_t fdl_isa_usable(const char* isa); /* 1 if built in and permitted by CPU and operating system, which is asked for AMX's registers */

/* Threads that are there already, those of the OpenMP runtime that other parts of the process use. parallel calls fn(data) on
 * so many threads, the caller among them, and returns when all have returned; thread_num tells each its number, 0 the caller. */
typedef struct fdl_team {
  void (*parallel)(void (*fn)(void*), void* data, unsigned threads, unsigned flags); /* GOMP_parallel */
  int (*thread_num)(void);                                                           /* omp_get_thread_num */
} fdl_team;

/* isa: NULL for the first usable of fdl_describe's. threads >= 1 counts the caller. Workers are pinned to cpus[1 .. threads-1]
 * when cpus is not NULL. nodes [node_count]: the memory nodes, as the system numbers them, that the threads are on: on
 * nodes[i] those from threads * i / node_count to before threads * (i + 1) / node_count. NULL if that is not known.
 * team: runs the workers; NULL: threads of the kernels' own do.
 * In a forked child the first call starts threads of its own, whatever the parent's were doing. */
int32_t fdl_open(const char* isa, int32_t threads, const int32_t* cpus, const int32_t* nodes, int32_t node_count,
                 const fdl_team* team, fdl_kernels** out);
void fdl_close(fdl_kernels*);
const char* fdl_isa(const fdl_kernels*);

/* One expert as a checkpoint has it, all bf16: gate, up (intermediate outputs of hidden inputs), down (hidden outputs of
 * intermediate inputs), and where the library's experts have biases one per output of each (else NULL).
 * Output o's weight for input i is element o * stride[0] + i * stride[1]; gate and up share their strides. Orders known are
 *   rows             stride[1] = 1: [outputs, inputs], also with gate's and up's rows in turn
 *   columns          stride[0] = 1: [inputs, outputs]
 *   columns in turn  stride[0] = 2 and up = gate + 1: [inputs, 2 * outputs]; not of down
 */
typedef struct fdl_expert {
  uint16_t* gate;
  uint16_t* up;
  uint16_t* down;
  uint16_t* gate_bias;
  uint16_t* up_bias;
  uint16_t* down_bias;
  int64_t gate_up_stride[2];
  int64_t down_stride[2];
  int64_t gate_up_bias_stride; /* between outputs; down's biases follow each other */
} fdl_expert;

/* To the packed layout (docs/kernels.md), 64-byte aligned, from any of the orders; and back, to rows. */
int32_t fdl_pack(fdl_kernels*, const fdl_expert* expert, uint16_t* packed);
int32_t fdl_unpack(fdl_kernels*, const uint16_t* packed, const fdl_expert* expert);

/* Puts the memory of a packed expert on the nodes of the threads that read it: before it is first written, or, present != 0, when
 * it is there or in a file: then its pages move. FDL_E_PLACE if the system refuses or, present == 0, a node is full: it
 * can be used all the same. Nothing where nodes are not known. */
int32_t fdl_settle(fdl_kernels*, uint16_t* packed, int32_t present);

int32_t fdl_moe(fdl_kernels*, const fdl_moe_call*);

/* Chooses a strategy for every expert of a layer: counts tokens per expert from topk_ids [count], then which misses to
 * stream so that the layer's makespan is least (docs/design.md, dispatch). Does not allocate or block.
 * resident   uint8 [num_experts], 1 if on the accelerator
 * counts     out, int32 [num_experts]
 * strategy   out, uint8 [num_experts]
 * split      out, int32 {expert, rows}: the one marked FDL_SPLIT and how many of its rows are streamed, or {-1, 0}
 * lane_us    out, predicted {CPU lane, accelerator lane}
 */
int32_t fdl_dispatch(const fdl_tables*, const int64_t* topk_ids, int64_t count, const uint8_t* resident,
                     int32_t num_experts, int32_t* counts, uint8_t* strategy, int32_t* split, float* lane_us);

/* Decode steps whose CPU lane a stream of an accelerator enters by itself, layer after layer.
 *
 * For each layer the stream copies its tokens to the mailbox (hidden, topk_ids, topk_weights), and then either writes the
 * layer's row + 1 to `asked` and waits until `answered` is at least that, or calls fdl_step_serve(fdl_step_layer(step, row)).
 * Then `out` holds the share of the experts that are not resident: none is streamed. Layers come one at a time. A stream that
 * uses the flags writes 0 to `answered` when a step begins.
 *
 * mailbox       hidden bf16 [tokens][hidden_size], topk_ids int64 and topk_weights fp32 [tokens][top_k], out fp32
 *               [tokens][hidden_size], with room for most_tokens
 * tables        whose stream_us is never worth paying
 * resident      uint8 [layers][num_experts];  experts: [layers] arrays as in fdl_moe_call
 * strategy, counts, lane_us, cpu_ns  out, [layers] times what fdl_dispatch gives, and nanoseconds of the CPU lane
 * polled        whether a thread polls `asked`; it looks without a pause while a step is on its way
 * stall_ms      without progress for so long, a step is given up: its status is FDL_E_STALL and `answered` stays open
 * Everything pointed to outlives the step, which belongs to the process that opened it: a forked child cannot begin it.
 */
typedef struct fdl_step fdl_step;

typedef struct fdl_step_setup {
  const fdl_tables* tables;
  const uint8_t* resident;
  const uint16_t* const* const* experts;
  const uint16_t* hidden;
  const int64_t* topk_ids;
  const float* topk_weights;
  float* out;
  uint32_t* asked;
  uint32_t* answered;
  uint8_t* strategy;
  int32_t* counts;
  float* lane_us;
  int64_t* cpu_ns;
  int64_t stall_ms;
  int64_t hidden_size;
  int32_t layers;
  int32_t num_experts;
  int32_t top_k;
  int32_t most_tokens;
  int32_t polled;
} fdl_step_setup;

int32_t fdl_step_open(fdl_kernels*, const fdl_step_setup*, fdl_step** out);
void fdl_step_close(fdl_step*);                       /* before its fdl_kernels, after the end of its last stream */
int32_t fdl_step_begin(fdl_step*, int64_t tokens);    /* before the stream starts; gives the status of an earlier failure */
int32_t fdl_step_end(fdl_step*, int32_t layers);      /* after the stream's end; layers: how many it should have asked for */
int32_t fdl_step_status(const fdl_step*);             /* at any time */
void* fdl_step_layer(fdl_step*, int32_t row);         /* what fdl_step_serve takes, or NULL */
void fdl_step_serve(void* layer);                     /* a CUhostFn */

/* What a stream does to a flag, for streams that are threads of this CPU. */
void fdl_flag_write(uint32_t* flag, uint32_t value);
void fdl_flag_wait(const uint32_t* flag, uint32_t value);

/* Measured limits of this machine, with this context's threads. */
int32_t fdl_probe_settle(fdl_kernels*, void* data, int64_t bytes); /* as fdl_settle, what fdl_probe_read reads; from 1 MiB on */
int32_t fdl_probe_read(fdl_kernels*, const void* data, int64_t bytes, double* gbps);  /* from 512 bytes on */
int32_t fdl_probe_peak(fdl_kernels*, double milliseconds, double* gflops); /* of this variant's multiply instruction */

#ifdef __cplusplus
}
#endif
#endif
