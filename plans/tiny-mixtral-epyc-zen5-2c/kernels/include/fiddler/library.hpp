// The C interface (abi.h) over the variants that library.cpp lists. Baseline code: runs on any x86-64 CPU.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

// What the library exports; everything else is compiled with hidden visibility.
#pragma GCC visibility push(default)
#include "abi.h"
#pragma GCC visibility pop

#include "amx_permission.hpp"
#include "cpu.hpp"
#include "dispatch.hpp"
#include "layout.hpp"
#include "moe.hpp"
#include "near_memory.hpp"
#include "packing.hpp"
#include "pool.hpp"
#include "stage.hpp"
#include "step.hpp"
#include "task.hpp"

// Defined by the generated library.cpp.
namespace fdl {
extern const Variant kVariants[];  // preferred first
extern const int kVariantCount;
extern const char kDescription[];
}  // namespace fdl

namespace fdl {

// What one process computes with. After a fork the child leaves it untouched, for the parent's threads do not exist there, and a
// call of one of them may have been caught halfway.
struct Instance {
  Instance(const Variant& variant, int threads) : pool(threads), layer(variant, pool) {}

  const pid_t process = getpid();
  Pool pool;
  MoeLayer layer;
  std::mutex busy;  // one call at a time; others wait
};

}  // namespace fdl

struct fdl_kernels {
  fdl_kernels(const fdl::Variant& chosen, int threads, const int32_t* cpus, const int32_t* node_ids, int node_count)
      : variant(chosen), nodes(node_ids, node_ids ? node_ids + node_count : node_ids), threads_(threads),
        cpus_(cpus, cpus ? cpus + threads : cpus) {}
  fdl_kernels(const fdl_kernels&) = delete;
  fdl_kernels& operator=(const fdl_kernels&) = delete;
  ~fdl_kernels() {
    fdl::Instance* instance = instance_.load();
    if (!instance || instance->process != getpid()) return;
    { const std::lock_guard<std::mutex> finished(instance->busy); }
    delete instance;
  }

  // This process's, made if there is none; null if a thread could not be started. Throws std::bad_alloc.
  fdl::Instance* instance(const fdl_team* team = nullptr) {
    fdl::Instance* found = instance_.load();
    if (found && found->process == getpid()) return found;
    auto made = std::make_unique<fdl::Instance>(variant, threads_);
    const int count = nodes.empty() ? 1 : static_cast<int>(nodes.size());
    if (!made->pool.start(cpus_.empty() ? nullptr : cpus_.data(), count, team)) return nullptr;
    // If another thread of this process was first, `found` is now its instance.
    return instance_.compare_exchange_strong(found, made.get()) ? made.release() : found;
  }

  const fdl::Variant& variant;
  const std::vector<int32_t> nodes;  // empty if not known

 private:
  const int threads_;
  const std::vector<int32_t> cpus_;
  std::atomic<fdl::Instance*> instance_{nullptr};
};

namespace fdl {

constexpr int32_t kMostThreads = 1024;

inline const Variant* find_variant(const char* isa) {
  for (int i = 0; i < kVariantCount; ++i) {
    const Variant& variant = kVariants[i];
    if ((!isa || std::strcmp(isa, variant.isa) == 0) && variant.usable()) return &variant;
  }
  return nullptr;
}

// Runs `body` alone on these kernels; what it throws becomes a status.
template <class Body>
int32_t guarded(fdl_kernels* kernels, Body body) {
  try {
    Instance* instance = kernels->instance();
    if (!instance) return FDL_E_THREAD;
    const std::lock_guard<std::mutex> lock(instance->busy);
    return body(*instance);
  } catch (const std::bad_alloc&) {
    return FDL_E_MEMORY;
  } catch (...) {
    return FDL_E_THREAD;
  }
}

constexpr int64_t kProbePiece = 1 << 20;  // that a thread reads at a time where bandwidth is measured

inline int32_t settled(fdl_kernels* kernels, std::initializer_list<Tasks> stages, const char* end, bool present) {
  if (!kernels) return FDL_E_ARGUMENT;
  if (kernels->nodes.size() < 2) return FDL_OK;
  return guarded(kernels, [&](Instance& here) -> int32_t {
    return settle(here.pool, kernels->nodes.data(), stages, end, present) ? FDL_OK : FDL_E_PLACE;
  });
}

// Calls work(i) for 0 <= i < sum of `waves` on all threads, which share every wave alike. Throws std::bad_alloc.
template <class Work>
void parallel_for(Pool& pool, std::initializer_list<int64_t> waves, Work work) {
  Stage stage(pool);
  stage.begin(pool.threads());
  for (const int64_t tasks : waves) stage.add_wave(tasks);
  stage.seal();
  auto job = [&](int thread) { stage.work_off(thread, [&](int64_t i, int64_t) { work(i); }); };
  pool.run(job);
}

inline bool valid(const fdl_expert& expert) {
  const bool biases = expert.gate_bias && expert.up_bias && expert.down_bias;
  return expert.gate && expert.up && expert.down && (!kBias || biases);
}

inline bool is_rows(const int64_t* stride) { return stride[1] == 1; }

// Writes the orders that the strides tell; false if there is one that is not known.
inline bool orders_of(const fdl_expert& expert, Order* gate_up, Order* down) {
  const int64_t* wide = expert.gate_up_stride;
  if (is_rows(wide))
    *gate_up = Order::kRows;
  else if (wide[0] == 2 && expert.up == expert.gate + 1)
    *gate_up = Order::kColumnsInTurn;
  else
    *gate_up = Order::kColumns;
  *down = is_rows(expert.down_stride) ? Order::kRows : Order::kColumns;
  return (*gate_up != Order::kColumns || wide[0] == 1) && (*down != Order::kColumns || expert.down_stride[0] == 1);
}

inline bool valid(const fdl_moe_call& call) {
  constexpr int64_t kMost = int64_t{1} << 31;
  if (call.tokens < 0 || call.top_k < 1 || call.num_experts < 1 || call.tokens >= kMost / call.top_k) return false;
  if (call.split_rows < 0 || call.split_rows >= kIntermediate || call.split_rows % kBlockRows != 0) return false;
  if (call.tokens == 0) return true;
  return call.hidden && call.topk_ids && call.topk_weights && call.experts && call.out &&
         (call.hidden_stride >= kHidden || call.tokens == 1);
}

}  // namespace fdl

extern "C" {

int32_t fdl_abi_version(void) { return FDL_ABI_VERSION; }

const char* fdl_describe(void) { return fdl::kDescription; }

const char* fdl_error_text(int32_t status) {
  switch (status) {
    case FDL_OK: return "no error";
    case FDL_E_ISA: return "no kernel variant in this library runs on this CPU, or the one asked for does not";
    case FDL_E_ARGUMENT: return "a pointer is null or a size is out of range";
    case FDL_E_MEMORY: return "out of memory";
    case FDL_E_THREAD: return "a worker thread could not be started";
    case FDL_E_PLACE: return "memory is not on the node where it belongs";
    case FDL_E_STALL: return "a step made no progress and was given up";
    default: return "unknown status";
  }
}

int64_t fdl_packed_bytes(void) { return fdl::kPackedBytes; }

int32_t fdl_isa_usable(const char* isa) { return isa && fdl::find_variant(isa) ? 1 : 0; }

int32_t fdl_open(const char* isa, int32_t threads, const int32_t* cpus, const int32_t* nodes, int32_t node_count,
                 const fdl_team* team, fdl_kernels** out) {
  const auto known = [](int32_t node) { return node >= 0 && node < fdl::kMostNodes; };
  if ((team && (!team->parallel || !team->thread_num)) || !out || threads < 1 || threads > fdl::kMostThreads ||
      (nodes && (node_count < 1 || node_count > threads || !std::all_of(nodes, nodes + node_count, known))))
    return FDL_E_ARGUMENT;
  *out = nullptr;
  const fdl::Variant* variant = fdl::find_variant(isa);  // before any thread starts
  if (!variant) return FDL_E_ISA;
  try {
    auto kernels = std::make_unique<fdl_kernels>(*variant, threads, cpus, nodes, node_count);
    if (!kernels->instance(team)) return FDL_E_THREAD;
    *out = kernels.release();
    return FDL_OK;
  } catch (const std::bad_alloc&) {
    return FDL_E_MEMORY;
  }
}

void fdl_close(fdl_kernels* kernels) { delete kernels; }

const char* fdl_isa(const fdl_kernels* kernels) { return kernels ? kernels->variant.isa : ""; }

int32_t fdl_pack(fdl_kernels* kernels, const fdl_expert* expert, uint16_t* packed) {
  fdl::Order gate_up, down;
  if (!kernels || !expert || !fdl::valid(*expert) || !fdl::orders_of(*expert, &gate_up, &down) || !packed ||
      reinterpret_cast<uintptr_t>(packed) % 64 != 0)
    return FDL_E_ARGUMENT;
  return fdl::guarded(kernels, [&](fdl::Instance& here) -> int32_t {
    fdl::parallel_for(here.pool, {fdl::kGateUpBlocks, fdl::kDownBlocks}, [&](int64_t block) {
      const uint16_t* outputs[fdl::kLanes];
      fdl::outputs_of_block<const uint16_t*>(block, expert->gate, expert->up, expert->down, expert->gate_up_stride[0],
                                             expert->down_stride[0], outputs);
      auto* lanes = reinterpret_cast<uint32_t*>(packed);
      const bool wide = block < fdl::kGateUpBlocks;
      fdl::pack_block(wide ? gate_up : down, outputs, wide ? expert->gate_up_stride[1] : expert->down_stride[1],
                      fdl::block_inputs(block), lanes + fdl::block_offset(block));
      if constexpr (fdl::kBias) {
        for (int64_t lane = 0; lane < fdl::kLanes; ++lane) {
          const uint16_t* bias = fdl::bias_of_lane(block, lane, expert->gate_bias, expert->up_bias, expert->down_bias,
                                                   expert->gate_up_bias_stride);
          lanes[fdl::bias_offset(block) + lane] = bias ? static_cast<uint32_t>(*bias) << 16 : 0;  // the same number in fp32
        }
      }
    });
    return FDL_OK;
  });
}

int32_t fdl_unpack(fdl_kernels* kernels, const uint16_t* packed, const fdl_expert* expert) {
  if (!kernels || !expert || !fdl::valid(*expert) || !fdl::is_rows(expert->gate_up_stride) ||
      !fdl::is_rows(expert->down_stride) || !packed)
    return FDL_E_ARGUMENT;
  return fdl::guarded(kernels, [&](fdl::Instance& here) -> int32_t {
    fdl::parallel_for(here.pool, {fdl::kGateUpBlocks, fdl::kDownBlocks}, [&](int64_t block) {
      uint16_t* rows[fdl::kLanes];
      fdl::outputs_of_block<uint16_t*>(block, expert->gate, expert->up, expert->down, expert->gate_up_stride[0],
                                       expert->down_stride[0], rows);
      const auto* lanes = reinterpret_cast<const uint32_t*>(packed);
      fdl::unpack_block(lanes + fdl::block_offset(block), fdl::block_inputs(block), rows);
      if constexpr (fdl::kBias) {
        for (int64_t lane = 0; lane < fdl::kLanes; ++lane)
          if (uint16_t* bias = fdl::bias_of_lane(block, lane, expert->gate_bias, expert->up_bias, expert->down_bias,
                                                 expert->gate_up_bias_stride))
            *bias = static_cast<uint16_t>(lanes[fdl::bias_offset(block) + lane] >> 16);
      }
    });
    return FDL_OK;
  });
}

int32_t fdl_settle(fdl_kernels* kernels, uint16_t* packed, int32_t present) {
  if (!packed) return FDL_E_ARGUMENT;
  auto* data = reinterpret_cast<char*>(packed);
  return fdl::settled(kernels, {{data, fdl::kGateUpBlocks, fdl::kGateUpBlockLanes * 4},
                                {data + fdl::kDownOffsetLanes * 4, fdl::kDownBlocks, fdl::kDownBlockLanes * 4}},
                      data + fdl::kPackedBytes, present != 0);
}

int32_t fdl_moe(fdl_kernels* kernels, const fdl_moe_call* call) {
  if (!kernels || !call || !fdl::valid(*call)) return FDL_E_ARGUMENT;
  if (call->tokens == 0) return FDL_OK;
  return fdl::guarded(kernels, [&](fdl::Instance& here) { return here.layer.run(*call); });
}

int32_t fdl_dispatch(const fdl_tables* tables, const int64_t* topk_ids, int64_t count, const uint8_t* resident,
                     int32_t num_experts, int32_t* counts, uint8_t* strategy, int32_t* split, float* lane_us) {
  if (!tables || !tables->cpu_us || !tables->gpu_us || tables->length < 1 || count < 0 || (count > 0 && !topk_ids) ||
      !resident || !counts || !strategy || !split || !lane_us || num_experts < 1 || num_experts > fdl::kMostExperts ||
      tables->rows < 0)
    return FDL_E_ARGUMENT;
  return fdl::dispatch(*tables, topk_ids, count, resident, num_experts, counts, strategy, split, lane_us);
}

int32_t fdl_step_open(fdl_kernels* kernels, const fdl_step_setup* setup, fdl_step** out) {
  if (!kernels || !setup || !out || !fdl::valid(*setup) || setup->hidden_size != fdl::kHidden) return FDL_E_ARGUMENT;
  *out = nullptr;
  try {
    *out = new fdl_step(kernels, *setup);
    return FDL_OK;
  } catch (const std::bad_alloc&) {
    return FDL_E_MEMORY;
  } catch (...) {
    return FDL_E_THREAD;
  }
}

void fdl_step_close(fdl_step* step) {
  if (step && step->alive()) delete step;
}

int32_t fdl_step_begin(fdl_step* step, int64_t tokens) {
  return step && step->takes(tokens) ? step->begin(tokens) : FDL_E_ARGUMENT;
}

int32_t fdl_step_end(fdl_step* step, int32_t layers) { return step ? step->end(layers) : FDL_E_ARGUMENT; }

int32_t fdl_step_status(const fdl_step* step) { return step ? step->status() : FDL_E_ARGUMENT; }

void* fdl_step_layer(fdl_step* step, int32_t row) { return step ? step->layer(row) : nullptr; }

void fdl_step_serve(void* layer) {
  const auto* of = static_cast<fdl_step::Layer*>(layer);
  of->step->serve(of->row);
}

void fdl_flag_write(uint32_t* flag, uint32_t value) { fdl::flag_store(flag, value); }

void fdl_flag_wait(const uint32_t* flag, uint32_t value) {
  fdl::look_until([=] { return fdl::flag_reached(flag, value); });
}

int32_t fdl_probe_settle(fdl_kernels* kernels, void* data, int64_t bytes) {
  if (!data || bytes < fdl::kProbePiece) return FDL_E_ARGUMENT;
  auto* begin = static_cast<char*>(data);
  return fdl::settled(kernels, {{begin, bytes / fdl::kProbePiece, fdl::kProbePiece}}, begin + bytes, true);
}

int32_t fdl_probe_read(fdl_kernels* kernels, const void* data, int64_t bytes, double* gbps) {
  if (!kernels || !data || bytes < 4 * fdl::kRowBytes || !gbps) return FDL_E_ARGUMENT;
  return fdl::guarded(kernels, [&](fdl::Instance& here) -> int32_t {
    const int64_t begin = fdl::now_ns();
    fdl::parallel_for(here.pool, {(bytes + fdl::kProbePiece - 1) / fdl::kProbePiece}, [&](int64_t i) {
      const int64_t first = i * fdl::kProbePiece;
      const int64_t length = bytes - first < fdl::kProbePiece ? bytes - first : fdl::kProbePiece;
      kernels->variant.read(static_cast<const char*>(data) + first, length);
    });
    const int64_t elapsed = fdl::now_ns() - begin;
    *gbps = static_cast<double>(bytes) / static_cast<double>(elapsed > 0 ? elapsed : 1);
    return FDL_OK;
  });
}

int32_t fdl_probe_peak(fdl_kernels* kernels, double milliseconds, double* gflops) {
  if (!kernels || !gflops || !(milliseconds > 0.0) || milliseconds > 60'000.0) return FDL_E_ARGUMENT;
  return fdl::guarded(kernels, [&](fdl::Instance& here) -> int32_t {
    // Every thread until the time is over; the sum of their rates, so that a late start does not count against them.
    std::atomic<int64_t> micro_gflops{0};
    const auto length = static_cast<int64_t>(milliseconds * 1e6);
    auto job = [&](int) {
      const int64_t begin = fdl::now_ns();
      double operations = 0.0;
      int64_t elapsed = 0;
      do {
        operations += kernels->variant.burn(2000);
        elapsed = fdl::now_ns() - begin;
      } while (elapsed < length);
      micro_gflops.fetch_add(static_cast<int64_t>(operations / static_cast<double>(elapsed) * 1e6));
    };
    here.pool.run(job);
    *gflops = static_cast<double>(micro_gflops.load()) * 1e-6;
    return FDL_OK;
  });
}

}  // extern "C"
