// Fork-join parallelism for kernels.
#pragma once

#include <cstdint>

namespace mudsc {

// Calls body(context, begin, end) on disjoint ranges that cover [0, count), on at most `threads` threads, the
// caller's among them, and returns when all are done. Ranges hold at least `grain` items, so small work stays on
// the caller. Bodies must not throw.
//
// Threads are started per call (about 20 us each) rather than pooled: no state survives a call, so fork() and
// interpreter shutdown are safe; kernels ask for threads only where the work is milliseconds.
void parallel_ranges(int threads, std::int64_t count, std::int64_t grain,
                     void (*body)(void* context, std::int64_t begin, std::int64_t end), void* context);

// The same for a callable object.
template <class Body>
inline void parallel_for(int threads, std::int64_t count, std::int64_t grain, Body& body) {
  parallel_ranges(
      threads, count, grain,
      [](void* context, std::int64_t begin, std::int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

}  // namespace mudsc
