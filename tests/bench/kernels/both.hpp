// What a core can do at once: in place of a kernel, a loop that reads a task's weights, once, and multiplies registers as
// often as the task has to, at least. No inputs are read, no sums stored; results are whatever was there. both.py says PLACES, the places
// of a block's depth that are read in turn, AHEAD, the rows that are fetched ahead at each, and the cache LEVEL.
#pragma once

namespace {

template <class Isa>
constexpr int kMostTokens = 16 / Isa::kSteps;  // of a turn: enough sums to hide a multiply's latency

// One block of `pairs` rows at each of kPlaces places: `turns` times kTokens tokens.
template <class Isa, int kPlaces, int kTokens>
[[gnu::noinline]] void both_at_once(const uint32_t* w, int64_t pairs, const uint32_t* next, int64_t turns) {
  typedef uint32_t Bits __attribute__((vector_size(Isa::kLanes * 4)));
  constexpr int kSums = Isa::kBurnSums, kEach = kTokens * Isa::kSteps;
  typename Isa::Vector acc[kSums] = {};
  typename Isa::Element zeros[2] = {};
  const typename Isa::Inputs inputs = Isa::template broadcast<0>(zeros);
  for (auto& sum : acc) asm volatile("" : "+v"(sum));  // none is known to be another
  const int64_t own = pairs < AHEAD ? 0 : pairs - AHEAD;
  const uint32_t* ahead = w + AHEAD * fdl::kLanes;
  for (int64_t p = 0; p < pairs; ++p, w += fdl::kLanes, ahead += fdl::kLanes) {
    if (p == own && next) ahead = next;
#pragma GCC unroll 4
    for (int place = 0; place < kPlaces; ++place) {
      if constexpr (AHEAD > 0) {
        __builtin_prefetch(ahead + place * pairs * fdl::kLanes, 0, 4 - LEVEL);
        __builtin_prefetch(ahead + place * pairs * fdl::kLanes + 16, 0, 4 - LEVEL);
      }
#pragma GCC unroll 16
      for (int n = 0; n < fdl::kLanes / Isa::kLanes; ++n) {
        Bits bits;
        __builtin_memcpy(&bits, w + place * pairs * fdl::kLanes + n * Isa::kLanes, sizeof bits);
        asm volatile("" : "+v"(bits));  // it is read, whether or not it is multiplied
        for (int64_t turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 64
          for (int i = 0; i < kEach; ++i) {
            auto& sum = acc[((place * fdl::kLanes / Isa::kLanes + n) * kEach + i) % kSums];
            sum = Isa::multiply_add(sum, (typename Isa::Weights)bits, inputs);
          }
        }
      }
    }
  }
  for (auto& sum : acc) asm volatile("" : : "m"(sum));
}

template <class Isa, int kPlaces, int kTokens = kMostTokens<Isa>>
void both_for(int64_t tokens, const uint32_t* w, int64_t pairs, const uint32_t* next, int64_t turns) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) return both_for<Isa, kPlaces, kTokens - 1>(tokens, w, pairs, next, turns);
  }
  both_at_once<Isa, kPlaces, kTokens>(w, pairs / kPlaces, next, turns);
}

template <class Isa, class>
inline void both(const fdl::Task& task) {
  const Parts turns(task.tokens, kMostTokens<Isa>);
  for (int64_t block = 0; block < task.blocks; ++block) {
    const uint32_t* w = task.weights + block * task.weight_stride;
    const uint32_t* next = next_block(task, block);
    if (task.pairs % PLACES == 0)
      both_for<Isa, PLACES>(turns.largest(), w, task.pairs, next, turns.count);
    else
      both_for<Isa, 1>(turns.largest(), w, task.pairs, next, turns.count);
  }
}

}  // namespace
