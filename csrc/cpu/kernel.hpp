// What every kernel source needs: scalar loads and scratch memory, in the namespace of its instruction level.
//
// Kernels are compiled several times with different instruction sets. The linker keeps one copy of a std inline
// function or template; if it is the one of the AVX-512 object, an older processor crashes. So kernels use only plain
// types of std, and these helpers live in the level's own namespace.
#pragma once

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "mudsc/isa.hpp"
#include "mudsc/types.hpp"

#define MUDSC_NUMBERS_NAMESPACE mudsc::MUDSC_ISA
#define MUDSC_NUMBERS_FUNCTION inline
#include "mudsc/numbers.hpp"

namespace mudsc::MUDSC_ISA {

// Size of the widest vectors of the instruction level.
#if defined(__AVX512F__)
constexpr std::int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr std::int64_t kVectorBytes = 32;
#else
constexpr std::int64_t kVectorBytes = 16;
#endif

// Thrown by Buffer; bindings convert it to MemoryError.
using mudsc::OutOfMemory;

// Call this before the first use of a large array that is read out of order or written all at once. Most of the cost is
// address translation or page faults, and huge pages need fewer of both. No effect where the system has no huge
// pages.
inline void prefer_huge_pages(void* data, std::int64_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t page = 4096;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
  const std::uintptr_t end =
      (reinterpret_cast<std::uintptr_t>(data) + static_cast<std::uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// 64-byte aligned, uninitialized array of a trivial type.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t size) : size_(size) {
    if (size < 0 || static_cast<std::uint64_t>(size) > (SIZE_MAX / 2) / sizeof(T)) throw OutOfMemory{};
    const std::size_t bytes = (static_cast<std::size_t>(size) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes == 0 ? 64 : bytes));
    if (data_ == nullptr) throw OutOfMemory{};
  }
  Buffer(std::int64_t size, T value) : Buffer(size) { fill(value); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) {
    other.data_ = nullptr;
    other.size_ = 0;
  }
  Buffer& operator=(Buffer&& other) noexcept {
    T* const data = data_;
    const std::int64_t size = size_;
    data_ = other.data_;
    size_ = other.size_;
    other.data_ = data;
    other.size_ = size;
    return *this;
  }
  ~Buffer() { std::free(data_); }

  void fill(T value) {
    for (std::int64_t i = 0; i < size_; ++i) data_[i] = value;
  }
  void prefer_huge_pages() { MUDSC_ISA::prefer_huge_pages(data_, size_ * static_cast<std::int64_t>(sizeof(T))); }
  T* data() { return data_; }
  const T* data() const { return data_; }
  std::int64_t size() const { return size_; }
  T& operator[](std::int64_t i) { return data_[i]; }
  const T& operator[](std::int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  std::int64_t size_ = 0;
};

}  // namespace mudsc::MUDSC_ISA
