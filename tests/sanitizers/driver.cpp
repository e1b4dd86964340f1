// Runs the generated library under a sanitizer: what it reads, writes and shares, not whether the numbers are right.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "fiddler/abi.h"
#include "shape.hpp"
#include "team.hpp"

namespace {

constexpr int kExperts = 5;
constexpr int kTopK = 2;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// A heap block of exactly so many bytes, 64-byte aligned, so that one byte too many is seen.
struct Block {
  explicit Block(size_t bytes) : data(std::aligned_alloc(64, bytes)) { std::memset(data, 0x3c, bytes); }
  ~Block() { std::free(data); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  uint16_t* bf16() const { return static_cast<uint16_t*>(data); }
  float* fp32() const { return static_cast<float*>(data); }
  void* data;
};

// An expert's matrices and biases in every order of a checkpoint, packed; and back where the order can be written.
void pack_orders(fdl_kernels* kernels, uint16_t* packed) {
  constexpr int64_t kH = fdl::kHidden, kI = fdl::kIntermediate;
  std::vector<uint16_t> wide(static_cast<size_t>(2 * kH * kI), 0x3c00), narrow(static_cast<size_t>(kH * kI), 0x3c00);
  std::vector<uint16_t> wide_bias(2 * kI), narrow_bias(kH);
  const struct {
    int64_t up, gate_up_stride[2], down_stride[2], bias;  // up: where it begins behind gate; bias: between two of gate's
  } orders[] = {
      {kH, {2 * kH, 1}, {kI, 1}, 2},   // rows in turn
      {kH * kI, {1, kI}, {1, kH}, 1},  // columns, behind each other
      {kI, {1, 2 * kI}, {1, kH}, 1},   // columns, beside each other
      {1, {2, 2 * kI}, {1, kH}, 2},    // columns in turn
      {kH * kI, {kH, 1}, {kI, 1}, 1},  // rows
  };
  for (const auto& order : orders) {
    const fdl_expert expert{wide.data(), wide.data() + order.up, narrow.data(), wide_bias.data(),
                            wide_bias.data() + (order.bias == 2 ? 1 : kI), narrow_bias.data(),
                            {order.gate_up_stride[0], order.gate_up_stride[1]}, {order.down_stride[0], order.down_stride[1]},
                            order.bias};
    require(fdl_pack(kernels, &expert, packed) == FDL_OK, "pack");
    const bool rows = order.gate_up_stride[1] == 1;
    require(fdl_unpack(kernels, packed, &expert) == (rows ? FDL_OK : FDL_E_ARGUMENT), "unpack");
  }
}

// So many rows that results go past the caches, of tiles those too that others are added to; again while that is wanted.
template <class Wanted>
void many_rows(fdl_kernels* kernels, Wanted again) {
  constexpr int64_t kTokens = (2 << 20) / (4 * fdl::kHidden) + 1;
  static_assert(fdl::kHidden % 16 == 0, "or no result goes past the caches");
  const Block packed(static_cast<size_t>(fdl_packed_bytes())), out(static_cast<size_t>(kTokens * fdl::kHidden * 4));
  const uint16_t* const experts[] = {packed.bf16(), packed.bf16()};
  const std::vector<uint16_t> hidden(static_cast<size_t>(kTokens * fdl::kHidden), 0x3c00);
  std::vector<int64_t> ids(2 * kTokens);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(i % 2);
  const std::vector<float> weight(2 * kTokens, 1.0f);
  do {
    for (const int32_t top_k : {1, 2}) {
      const fdl_moe_call call{hidden.data(), fdl::kHidden, ids.data(), weight.data(), nullptr, experts,
                              out.fp32(),    kTokens,      top_k,      2,             0};
      require(fdl_moe(kernels, &call) == FDL_OK, "moe of many rows");
    }
  } while (again());
}

void layers(fdl_kernels* kernels, unsigned seed) {
  std::mt19937 random(seed);
  const Block packed(static_cast<size_t>(fdl_packed_bytes()));
  pack_orders(kernels, packed.bf16());
  const uint16_t* experts[kExperts];
  for (auto& expert : experts) expert = packed.bf16();

  for (const int64_t tokens : {0, 1, 2, 7, 65, 300}) {
    std::vector<uint16_t> hidden(static_cast<size_t>(tokens * fdl::kHidden), 0x3c00);
    std::vector<int64_t> ids(static_cast<size_t>(tokens * kTopK));
    std::vector<float> weight(ids.size(), 0.5f), out(hidden.size());
    for (auto& id : ids) id = static_cast<int64_t>(random() % (kExperts + 2)) - 1;
    for (const int32_t rows : {0, 64}) {
      if (rows >= fdl::kIntermediate) continue;
      uint8_t strategy[kExperts] = {FDL_CPU, FDL_SPLIT, FDL_CPU, FDL_STREAMED, FDL_RESIDENT};
      const fdl_moe_call call{hidden.data(), fdl::kHidden, ids.data(), weight.data(), strategy, experts,
                              out.data(),    tokens,       kTopK,      kExperts,      rows};
      require(fdl_moe(kernels, &call) == FDL_OK, "moe");
    }
  }
}

// What a forked child does. The thread sanitizer does not follow a process with threads there.
template <class Body>
void in_a_child(Body body) {
#ifndef __SANITIZE_THREAD__
  const pid_t child = fork();
  if (child == 0) {
    alarm(100);
    body();
    _exit(0);
  }
  int status = 1;
  require(waitpid(child, &status, 0) == child && status == 0, "a forked child");
#else
  static_cast<void>(body);
#endif
}

void dispatches() {
  std::mt19937 random(7);
  std::vector<float> cpu(100), gpu(100);
  for (size_t i = 1; i < cpu.size(); ++i) {
    cpu[i] = cpu[i - 1] + static_cast<float>(random() % 100);
    gpu[i] = gpu[i - 1] + static_cast<float>(random() % 100);
  }
  for (const int32_t experts : {1, 8, 13, 256, 1024}) {
    for (const int32_t rows : {0, 100, 14336}) {
      const fdl_tables tables{cpu.data(), gpu.data(), 100, 1, 5, 60, 0.2f, rows};
      std::vector<int64_t> ids(4096);
      for (auto& id : ids) id = static_cast<int64_t>(random()) % (experts + 3) - 1;
      std::vector<uint8_t> resident(static_cast<size_t>(experts)), strategy(resident.size());
      for (auto& home : resident) home = random() % 4 == 0;
      std::vector<int32_t> counts(resident.size());
      int32_t split[2];
      float lanes[2];
      for (const int64_t count : {0, 1, 16, 4096})
        require(fdl_dispatch(&tables, ids.data(), count, resident.data(), experts, counts.data(), strategy.data(), split,
                             lanes) == FDL_OK,
                "dispatch");
    }
  }
}

// Captured steps: a stream that enters the CPU lane by flags, one that calls it, and one that never comes.
void steps(fdl_kernels* kernels) {
  constexpr int kLayers = 3, kTokens = 2;
  const Block packed(static_cast<size_t>(fdl_packed_bytes()));
  const uint16_t* experts[kExperts];
  for (auto& expert : experts) expert = packed.bf16();
  const uint16_t* const* rows[kLayers] = {experts, experts, experts};
  const std::vector<float> us{0, 1, 2};
  const fdl_tables tables{us.data(), us.data(), 3, 1, 1, 1e30f, 0, 0};
  const std::vector<uint8_t> resident(kLayers * kExperts);
  std::vector<uint16_t> hidden(kTokens * fdl::kHidden, 0x3c00);
  const std::vector<int64_t> ids{0, 1, 4, 2};
  const std::vector<float> weight(ids.size(), 0.5f);
  std::vector<float> out(hidden.size()), lanes(2 * kLayers);
  std::vector<uint8_t> strategy(resident.size());
  std::vector<int32_t> counts(resident.size());
  std::vector<int64_t> ns(kLayers);
  alignas(128) static uint32_t flags[64];
  for (const int32_t polled : {1, 0, 2}) {
    const bool lost = polled == 2;
    const fdl_step_setup setup{&tables,   resident.data(), rows,         hidden.data(), ids.data(), weight.data(),
                               out.data(), flags,           flags + 32,   strategy.data(), counts.data(), lanes.data(),
                               ns.data(),  lost ? 50 : 60000, fdl::kHidden, kLayers,       kExperts,   kTopK,
                               kTokens,    polled != 0};
    fdl_step* step = nullptr;
    require(fdl_step_open(kernels, &setup, &step) == FDL_OK, "step open");
    in_a_child([&] {
      require(fdl_step_begin(step, kTokens) == FDL_E_THREAD, "a step of another process");
      fdl_step_close(step);
    });
    for (int repeat = 0; repeat < 3; ++repeat) {
      require(fdl_step_begin(step, kTokens) == (lost && repeat ? FDL_E_STALL : FDL_OK), "step begin");
      if (lost && repeat) break;
      std::thread stream([&] {
        fdl_flag_write(flags + 32, 0);
        for (int row = 0; row < kLayers; ++row) {
          for (auto& value : hidden) value = static_cast<uint16_t>(0x3c00 + row);
          if (polled) {
            if (!lost) fdl_flag_write(flags, static_cast<uint32_t>(row) + 1);
            fdl_flag_wait(flags + 32, static_cast<uint32_t>(row) + 1);
          } else {
            fdl_step_serve(fdl_step_layer(step, row));
          }
          volatile float seen = out[0];
          (void)seen;
        }
      });
      stream.join();
      require(fdl_step_end(step, kLayers) == (lost ? FDL_E_STALL : FDL_OK), "step end");
    }
    fdl_step_close(step);
  }
}

// Children that are forked while another thread computes. It allocates nothing: the address sanitizer's heap does not survive
// a fork within.
void forks(fdl_kernels* kernels) {
  std::atomic<bool> stop{false}, begun{false};
  std::thread busy([&] {
    many_rows(kernels, [&] {
      begun.store(true);
      return !stop.load();
    });
  });
  while (!begun.load()) usleep(1000);
  for (int i = 0; i < 5; ++i) {
    usleep(1000);
    in_a_child([&] {
      std::thread other([&] { layers(kernels, 5); });
      layers(kernels, 6);
      other.join();
      fdl_close(kernels);
    });
  }
  stop.store(true);
  busy.join();
}

// Memory that is said to be nobody's yet, then to be there: on every system it is as it was.
void settles(fdl_kernels* kernels) {
  std::vector<uint16_t> data(static_cast<size_t>(fdl_packed_bytes() / 2), 1), probed((1 << 20) * 3 / 2, 1);
  const auto tried = [](int32_t status) { return status == FDL_OK || status == FDL_E_PLACE; };
  require(tried(fdl_settle(kernels, data.data(), 0)) && tried(fdl_settle(kernels, data.data(), 1)), "settle");
  require(tried(fdl_probe_settle(kernels, probed.data(), static_cast<int64_t>(probed.size()) * 2)), "settle a probe");
  const auto untouched = [](const auto& all) { return std::all_of(all.begin(), all.end(), [](auto one) { return one == 1; }); };
  require(untouched(data) && untouched(probed), "settled memory is as it was");
}

}  // namespace

int main() {
  const int32_t cpus[] = {0, 1, 0, 1}, nodes[] = {0, 0};
  dispatches();
  for (const char* isa : {"amx_bf16", "avx512_bf16", "avx512f", "avx2", "scalar"}) {
    if (!fdl_isa_usable(isa)) {
      std::printf("skipped %s: not built in, or not permitted here\n", isa);
      continue;
    }
    fdl_kernels* one = nullptr;
    fdl_kernels* other = nullptr;
    fdl_kernels* near = nullptr;
    fdl_kernels* teamed = nullptr;
    require(fdl_open(isa, 3, nullptr, nullptr, 0, nullptr, &one) == FDL_OK && fdl_open(isa, 2, nullptr, nullptr, 0, nullptr, &other) == FDL_OK &&
                fdl_open(isa, 4, cpus, nodes, 2, nullptr, &near) == FDL_OK && fdl_open(isa, 3, nullptr, nullptr, 0, &team::kTeam, &teamed) == FDL_OK,
            "open");
    // Two engines beside each other, and two callers of the same one.
    std::thread first([&] { layers(one, 1); }), second([&] { layers(other, 2); });
    layers(one, 3);
    first.join();
    second.join();
    for (fdl_kernels* kernels : {near, teamed}) layers(kernels, 7);
    settles(near);
    many_rows(one, [] { return false; });
    steps(one);
    forks(one);
    for (fdl_kernels* kernels : {one, other, near, teamed}) fdl_close(kernels);
    std::printf("ran %s\n", isa);
  }
}
