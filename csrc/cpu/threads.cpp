#include "mudsc/threads.hpp"

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

namespace mudsc {

void parallel_ranges(int threads, std::int64_t count, std::int64_t grain,
                     void (*body)(void* context, std::int64_t begin, std::int64_t end), void* context) {
  if (count <= 0) return;
  const std::int64_t most = (count + std::max<std::int64_t>(grain, 1) - 1) / std::max<std::int64_t>(grain, 1);
  const std::int64_t parts = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, most));
  const auto bound = [&](std::int64_t part) { return count / parts * part + std::min(count % parts, part); };

  std::vector<std::thread> workers;
  workers.reserve(static_cast<std::size_t>(parts - 1));
  std::int64_t started = 1;
  try {
    for (; started < parts; ++started) workers.emplace_back(body, context, bound(started), bound(started + 1));
  } catch (const std::system_error&) {
    // The system refuses more threads: the caller does what is left.
  }
  body(context, 0, bound(1));
  if (started < parts) body(context, bound(started), count);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace mudsc
