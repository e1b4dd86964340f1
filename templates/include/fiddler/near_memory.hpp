// Weights on the memory node whose threads read them, on machines with several.
//
// A page that nobody has written yet is placed by who writes it first: not surely the thread that will read it, and a huge page
// is one node's as a whole. So the system is told where pages belong before they are written, and moves those that are there.
#pragma once

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "pool.hpp"
#include "stage.hpp"

namespace fdl {

constexpr int kMostNodes = 1024;  // what Linux numbers

// Whole pages, each of which belongs to where its first byte does.
struct Pages {
  static constexpr uintptr_t kBytes = 4096;  // the smallest there are

  Pages(const char* begin, const char* end) : begin(first_from(begin)), end(first_from(end)) {}

  // Says on which of `count` nodes those belong that are not there yet; move: and those that are. False if the system refuses.
  bool prefer(const int32_t* nodes, int count, bool move) const {
    constexpr unsigned kPreferred = 1, kInterleave = 3, kMove = 2;  // MPOL_PREFERRED, MPOL_INTERLEAVE, MPOL_MF_MOVE
    constexpr int kBits = 8 * sizeof(unsigned long);
    unsigned long mask[kMostNodes / kBits] = {};
    for (int i = 0; i < count; ++i) mask[nodes[i] / kBits] |= 1ul << (nodes[i] % kBits);
    return begin >= end || syscall(SYS_mbind, begin, end - begin, count == 1 ? kPreferred : kInterleave, mask, kMostNodes + 1ul,
                                   move ? kMove : 0u) == 0;
  }

  // Looks at some, and counts those that are on the node, [1], and those that are not, [0].
  void count(int32_t node, int64_t* counts) const {
    constexpr unsigned long kNodeOfPage = 3;  // MPOL_F_NODE, MPOL_F_ADDR
    const uintptr_t step = std::max((end - begin) / 16 / kBytes, uintptr_t{1}) * kBytes;
    for (uintptr_t page = begin; page < end; page += step) {
      int found = -1;
      ++counts[syscall(SYS_get_mempolicy, &found, nullptr, 0ul, page, kNodeOfPage) == 0 && found == node];
    }
  }

  uintptr_t begin, end;

 private:
  static uintptr_t first_from(const char* byte) { return (reinterpret_cast<uintptr_t>(byte) + kBytes - 1) / kBytes * kBytes; }
};

// Tasks that the threads share alike, and the memory of each after that of the one before.
struct Tasks {
  char* data;
  int64_t count, bytes;

  // Of the tasks of one node's threads.
  Pages pages(const Pool& pool, int node) const {
    return {data + pool.border(count, node) * bytes, data + pool.border(count, node + 1) * bytes};
  }
  // Has a task's memory read or, where there is none yet, taken. Changes nothing in it.
  void touch(int64_t task, bool present) const {
    const Pages own(data + task * bytes, data + (task + 1) * bytes);
    for (uintptr_t page = own.begin; page < own.end; page += Pages::kBytes) {
      auto* byte = reinterpret_cast<char*>(page);
      if (present)
        static_cast<void>(*static_cast<volatile char*>(byte));
      else  // reading first would have a page of zeros put there, which writing then replaces by small ones
        asm volatile("orb $0, %0" : "+m"(*byte));
    }
  }
};

// Puts the memory of tasks on the nodes of the threads that do them. All of it, and what else lies before `end`, follows
// `stages`' first. present: its pages are there, or in a file; else nobody has written to it yet.
// False if the system refuses or, not of a file, more than a few are not there in the end: a node is full. Throws std::bad_alloc.
inline bool settle(Pool& pool, const int32_t* nodes, std::initializer_list<Tasks> stages, const char* end, bool present) {
  const auto for_each_node = [&](auto work) {
    for (const Tasks& tasks : stages)
      for (int node = 0; node < pool.nodes(); ++node) work(tasks.pages(pool, node), nodes[node]);
  };
  const auto place = [&](bool move) {
    bool advised = true;
    for_each_node([&](const Pages& pages, int32_t node) { advised &= pages.prefer(&node, 1, move); });
    return advised;
  };
  const auto placed = [&] {
    int64_t counts[2] = {};
    for_each_node([&](const Pages& pages, int32_t node) { pages.count(node, counts); });
    return counts[0] * 16 <= counts[0] + counts[1];  // a large page at a border is on one of its sides
  };
  // Where the system takes no advice, everyone touches what he will read himself. Not all of a team need come.
  const bool helps = present || place(false) || pool.beside_torch();
  for (const Tasks& tasks : stages) {
    Stage stage(pool);
    stage.begin(pool.threads());
    stage.add_wave(tasks.count);
    stage.seal();
    auto job = [&](int thread) { stage.work_off(thread, [&](int64_t task, int64_t) { tasks.touch(task, present); }, helps); };
    pool.run(job);
  }
  // A file's pages are read to anywhere, whatever was said, and a page may have been there with what lies before it. How many of
  // a file's move is the system's business: some are large, and move as a whole, some are others' too.
  bool settled = placed();
  if (!settled) {
    const bool moved = place(true);
    settled = present ? moved : placed();
  }
  // Advice that differs parts a mapping, and a process may have only so many parts. But none at all would have the system look
  // again and again whether pages had better be elsewhere, and make huge ones of small ones that are on two nodes.
  const Pages whole(stages.begin()->data, end);
  whole.prefer(nodes, pool.nodes(), false);
  if (!present && whole.begin < whole.end) madvise(reinterpret_cast<void*>(whole.begin), whole.end - whole.begin, MADV_NOHUGEPAGE);
  return settled;
}

}  // namespace fdl
