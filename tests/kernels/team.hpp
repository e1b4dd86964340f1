// A team of threads that is there already, as an OpenMP runtime's, for fdl_open.
#pragma once

#include <thread>
#include <vector>

#include "fiddler/abi.h"

namespace team {

inline thread_local int number = 0;  // of this thread

inline void parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned t = 1; t < threads; ++t)
    others.emplace_back([=] {
      number = static_cast<int>(t);
      work(data);
    });
  work(data);
  for (std::thread& other : others) other.join();
}

inline constexpr fdl_team kTeam{parallel, [] { return number; }};

}  // namespace team
