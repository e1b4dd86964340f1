// Weights on the memory node whose threads read them, on machines with several.
//
// A page that nobody has written yet is placed by who writes it first: not surely the thread that will read it, and a huge page
// is one node's as a whole. So the system is told where pages belong before they are written, and moves those that are there.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "pool.hpp"
#include "stage.hpp"

namespace fdl {

constexpr int kMostNodes = 1024;      // what Linux numbers
constexpr int64_t kPageBytes = 4096;  // the smallest there are

enum class Policy { kPreferred = 1, kInterleave = 3 };  // MPOL_PREFERRED, MPOL_INTERLEAVE

// Says on which of `count` nodes pages belong that are not there yet, from the one `begin` is in to before the one `end` is in.
// move: and those that are there. False if the system refuses.
inline bool advise(uintptr_t begin, uintptr_t end, Policy policy, const int32_t* nodes, int count, bool move) {
  constexpr unsigned kMove = 2;  // MPOL_MF_MOVE
  constexpr int kBits = 8 * sizeof(unsigned long);
  unsigned long mask[kMostNodes / kBits] = {};
  for (int i = 0; i < count; ++i) mask[nodes[i] / kBits] |= 1ul << (nodes[i] % kBits);
  begin -= begin % kPageBytes;
  end -= end % kPageBytes;
  return begin >= end || syscall(SYS_mbind, begin, end - begin, policy, mask, kMostNodes + 1ul, move ? kMove : 0u) == 0;
}

// Has a task's memory read or, if there is none yet, taken. Changes nothing in it.
inline void touch(char* begin, int64_t bytes, bool present) {
  for (int64_t at = 0; at < bytes; at += kPageBytes) {
    if (present)
      static_cast<void>(*static_cast<volatile char*>(begin + at));
    else
      __atomic_fetch_or(begin + at, 0, __ATOMIC_RELAXED);  // reading would not take any
  }
}

// Puts the memory of `tasks` tasks that follow each other, and are dealt out alike, on the nodes of the threads that do them.
// present: its pages are there, or in a file; else nobody has written to it yet.
// False if the system refuses: then memory lies where the threads that do the tasks wrote or read it first, about.
// Throws std::bad_alloc.
inline bool settle(Pool& pool, const int32_t* nodes, char* data, int64_t tasks, int64_t task_bytes, bool present) {
  const auto address = [&](int64_t task) { return reinterpret_cast<uintptr_t>(data + task * task_bytes); };
  const auto place = [&] {
    bool placed = true;
    for (int node = 0; node < pool.nodes(); ++node)
      placed &= advise(address(pool.border(tasks, node)), address(pool.border(tasks, node + 1)), Policy::kPreferred, nodes + node, 1,
                       present);
    return placed;
  };
  bool placed = present || place();
  Stage stage(pool);
  stage.begin(pool.threads());
  stage.add_wave(tasks);
  stage.seal();
  auto job = [&](int thread) {
    stage.work_off(thread, [&](int64_t task, int64_t) { touch(data + task * task_bytes, task_bytes, present); }, false);
  };
  pool.run(job);
  if (present) placed = place();  // pages of a file are read to anywhere, whatever was said: they move now
  // Advice that differs parts a mapping, and a process may have only so many parts. But none at all would have the system look
  // again and again whether pages had better be elsewhere (NUMA balancing).
  advise(address(0), address(tasks), Policy::kInterleave, nodes, pool.nodes(), false);
  return placed;
}

}  // namespace fdl
