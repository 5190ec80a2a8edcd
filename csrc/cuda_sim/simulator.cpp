// The scheduler of fibers; see simulator.hpp.
//
// With ThreadSanitizer, the kernels are instrumented but this file is not, because it accesses the memory of all
// fibers. MUDSC_THREAD_SANITIZER makes it announce fibers and barriers to ThreadSanitizer.
#include "simulator.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mudsc/cuda.hpp"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(MUDSC_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace mudsc::cuda_sim {
namespace {

constexpr std::size_t kStackBytes = 64 * 1024;
constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned char kPoison = 0xcd;
constexpr std::size_t kLargestSharedMemory = 227 * 1024;
constexpr std::uint32_t kDynamicSharedBegin = 1040;  // on a device, after the static arrays
constexpr std::size_t kFenceBytes = 16;              // stores are fenced in pieces of so many

// An execution context with its own stack.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  void* thread_sanitizer = nullptr;
  void* fake_stack = nullptr;  // of AddressSanitizer
  const void* stack = nullptr;
  std::size_t stack_bytes = 0;
};

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack, and continues where the other stack was left. Parameters are in rdi
// and rsi.
__attribute__((naked, noinline)) void switch_stacks(void** /* save */, void* /* other */) {
  asm volatile(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}
#endif

enum class State { ready, at_warp, at_block, at_grid, exited };

struct Block;

struct Fiber {
  Context context;
  Position position;
  Block* block = nullptr;
  unsigned rank = 0;  // within the block
  State state = State::ready;
  std::uint32_t mask = 0;  // of the exchange that it waits in
  std::uint64_t value = 0;
  std::uint64_t received[kLanes];
  std::vector<std::uint32_t> unfenced;  // pieces of dynamic shared memory
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<std::uint32_t> live_lanes;  // by warp
  std::vector<std::pair<const void*, std::unique_ptr<unsigned char[]>>> arrays;
  std::unique_ptr<unsigned char[]> dynamic;
  std::size_t dynamic_bytes = 0, static_bytes = 0;
  std::vector<std::uint32_t> unfenced_stores;  // by piece of dynamic shared memory, of all threads
  std::vector<char> warp_order;                // addresses that stand for happens-before in ThreadSanitizer
  char block_order = 0;
  unsigned live = 0;
  unsigned at_barrier = 0;
};

std::uint64_t chosen_seed = 0;
std::size_t shared_limit = kLargestSharedMemory;

void release_order([[maybe_unused]] void* address) {
#if defined(MUDSC_THREAD_SANITIZER)
  __tsan_release(address);
#endif
}
void acquire_order([[maybe_unused]] void* address) {
#if defined(MUDSC_THREAD_SANITIZER)
  __tsan_acquire(address);
#endif
}

// During its lifetime, ThreadSanitizer ignores what the current fiber or the scheduler does, including allocations and
// frees.
struct Aside {
  Aside() {
#if defined(MUDSC_THREAD_SANITIZER)
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  ~Aside() {
#if defined(MUDSC_THREAD_SANITIZER)
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  }
  Aside(const Aside&) = delete;
  Aside& operator=(const Aside&) = delete;
};

// Memory with the pattern in it.
std::unique_ptr<unsigned char[]> poisoned(std::size_t bytes) {
  std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes]);
  if (bytes > 0) std::memset(memory.get(), kPoison, bytes);
  return memory;
}

class Launch;
thread_local Launch* running = nullptr;
thread_local Fiber* current = nullptr;

class Launch {
 public:
  Launch(const char* name, dim3 blocks, dim3 threads, std::size_t shared_bytes, bool cooperative,
         const std::function<void()>& body)
      : name_(name),
        blocks_(blocks),
        threads_(threads),
        shared_bytes_(shared_bytes),
        cooperative_(cooperative),
        body_(body),
        random_(chosen_seed) {}

  void run() {
    const Aside aside;
    const unsigned count = blocks_.x * blocks_.y * blocks_.z;
    std::vector<unsigned> order(count);
    for (unsigned index = 0; index < count; ++index) order[index] = index;
    if (chosen_seed != 0) std::shuffle(order.begin(), order.end(), random_);
    running = this;
#if defined(MUDSC_THREAD_SANITIZER)
    scheduler_.thread_sanitizer = __tsan_get_current_fiber();
#endif
    release_order(&begin_order_);
    const unsigned together = cooperative_ ? count : 1;
    for (unsigned begin = 0; begin < count && error_.empty(); begin += together) {
      std::vector<std::unique_ptr<Block>> blocks;
      for (unsigned k = 0; k < together; ++k) blocks.push_back(make_block(order[begin + k]));
      run_together(blocks);
#if defined(MUDSC_THREAD_SANITIZER)
      // For ThreadSanitizer, blocks are unordered until the launch ends, so their memory must not be reused before.
      for (auto& block : blocks) finished_.push_back(std::move(block));
#else
      stacks_used_ = 0;
#endif
    }
    acquire_order(&end_order_);
#if defined(MUDSC_THREAD_SANITIZER)
    for (void* fiber : thread_sanitizer_fibers_) __tsan_destroy_fiber(fiber);
#endif
    running = nullptr;
    if (!error_.empty()) throw std::runtime_error(std::string("simulated kernel ") + name_ + ": " + error_);
  }

  // Suspends the current fiber until it is made ready again.
  void wait(State state) {
    Fiber& me = *current;
    me.state = state;
    switch_to(me.context, scheduler_, state == State::exited);
  }

  // Ends the launch with an error; the current fiber is never resumed.
  void fail(const std::string& message) {
    error_ = message;
    wait(State::exited);
  }

  void make_ready(std::vector<Fiber*> fibers) {
    if (chosen_seed != 0) std::shuffle(fibers.begin(), fibers.end(), random_);
    for (Fiber* fiber : fibers) {
      fiber->state = State::ready;
      ready_.push_back(fiber);
    }
  }

  void release_block(Block& block) {
    block.at_barrier = 0;
    make_ready(waiting(block, State::at_block));
  }

  void arrive_at_grid() {
    if (!cooperative_) return fail("grid barrier in a launch that is not cooperative");
    release_order(&grid_order_);
    if (++at_grid_ == grid_threads_) {
      at_grid_ = 0;
      std::vector<Fiber*> fibers;
      for (Block* block : together_) {
        for (Fiber* fiber : waiting(*block, State::at_grid)) fibers.push_back(fiber);
      }
      make_ready(std::move(fibers));
    } else {
      wait(State::at_grid);
    }
    acquire_order(&grid_order_);
  }

  void note_exit(const Fiber& fiber) {
    const Aside aside;
    Block& block = *fiber.block;
    block.live_lanes[fiber.rank / kLanes] &= ~(1u << fiber.position.lane);
    if (--block.live > 0 && block.at_barrier == block.live) release_block(block);
  }

  // Where a fiber begins.
  static void enter() {
    Launch& launch = *running;
    finish_switch(current->context, &launch.scheduler_);
    acquire_order(&launch.begin_order_);
    launch.body_();
    release_order(&launch.end_order_);
    launch.note_exit(*current);
    launch.wait(State::exited);
    std::abort();
  }

 private:
  static std::vector<Fiber*> waiting(Block& block, State state) {
    std::vector<Fiber*> fibers;
    for (Fiber& fiber : block.fibers) {
      if (fiber.state == state) fibers.push_back(&fiber);
    }
    return fibers;
  }

  std::unique_ptr<Block> make_block(unsigned index) {
    auto block = std::make_unique<Block>();
    const unsigned count = threads_.x * threads_.y * threads_.z, warps = (count + kLanes - 1) / kLanes;
    block->fibers.resize(count);
    block->live_lanes.resize(warps, 0);
    block->warp_order.resize(warps);
    block->dynamic = poisoned(shared_bytes_);
    block->dynamic_bytes = shared_bytes_;
    block->unfenced_stores.resize((shared_bytes_ + kFenceBytes - 1) / kFenceBytes);
    block->live = count;
    const dim3 place(index % blocks_.x, index / blocks_.x % blocks_.y, index / blocks_.x / blocks_.y);
    for (unsigned rank = 0; rank < count; ++rank) {
      Fiber& fiber = block->fibers[rank];
      fiber.block = block.get();
      fiber.rank = rank;
      fiber.position = {dim3(rank % threads_.x, rank / threads_.x % threads_.y, rank / threads_.x / threads_.y), place,
                        threads_, blocks_, rank % kLanes};
      block->live_lanes[rank / kLanes] |= 1u << (rank % kLanes);
      begin(fiber.context);
    }
    return block;
  }

  void begin(Context& context) {
    unsigned char* const stack = take_stack();
    context.stack = stack;
    context.stack_bytes = kStackBytes;
#if defined(__x86_64__)
    // What switch_stacks pops: six registers, then the address to go to; above it, the caller that is none.
    void** top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&Launch::enter);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    context.stack_pointer = top;
#else
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = stack;
    context.registers.uc_stack.ss_size = kStackBytes;
    context.registers.uc_link = nullptr;
    makecontext(&context.registers, &Launch::enter, 0);
#endif
#if defined(MUDSC_THREAD_SANITIZER)
    context.thread_sanitizer = __tsan_create_fiber(0);
    thread_sanitizer_fibers_.push_back(context.thread_sanitizer);
#endif
  }

  // Stacks are kept for later blocks and launches, without AddressSanitizer's records of the previous fiber.
  unsigned char* take_stack() {
    static thread_local std::vector<unsigned char*> stacks;
    if (stacks_used_ == stacks.size()) {
      void* const memory =
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      stacks.push_back(static_cast<unsigned char*>(memory));
    }
    unsigned char* const stack = stacks[stacks_used_++];
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStackBytes);
#endif
    return stack;
  }

  void run_together(std::vector<std::unique_ptr<Block>>& blocks) {
    std::vector<Fiber*> fibers;
    together_.clear();
    for (const auto& block : blocks) {
      together_.push_back(block.get());
      for (Fiber& fiber : block->fibers) fibers.push_back(&fiber);
    }
    grid_threads_ = fibers.size();
    at_grid_ = 0;
    make_ready(fibers);
    while (!ready_.empty() && error_.empty()) resume(next());
    ready_.clear();
    const bool all_exited =
        std::all_of(fibers.begin(), fibers.end(), [](const Fiber* fiber) { return fiber->state == State::exited; });
    if (error_.empty() && !all_exited) error_ = "threads wait for each other at different barriers";
  }

  Fiber& next() {
    std::size_t place = 0;
    if (chosen_seed % 2 == 1) place = ready_.size() - 1;
    if (chosen_seed % 2 == 0 && chosen_seed != 0) place = random_() % ready_.size();
    std::swap(ready_[place], chosen_seed == 0 ? ready_.front() : ready_.back());
    Fiber* const fiber = chosen_seed == 0 ? ready_.front() : ready_.back();
    chosen_seed == 0 ? ready_.pop_front() : ready_.pop_back();
    return *fiber;
  }

  void resume(Fiber& fiber) {
    current = &fiber;
    switch_to(scheduler_, fiber.context, false);
    current = nullptr;
  }

  static void switch_to(Context& from, Context& to, [[maybe_unused]] bool for_ever) {
#if defined(MUDSC_THREAD_SANITIZER)
    __tsan_switch_to_fiber(to.thread_sanitizer, 1);  // 1: the switch itself orders nothing
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__x86_64__)
    switch_stacks(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.registers, &to.registers);
#endif
    finish_switch(from, nullptr);
  }

  // Back in `here`. A fiber that runs for the first time records the stack of its scheduler.
  static void finish_switch([[maybe_unused]] Context& here, [[maybe_unused]] Context* came_from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(here.fake_stack, came_from == nullptr ? nullptr : &came_from->stack,
                                    came_from == nullptr ? nullptr : &came_from->stack_bytes);
#endif
  }

  const char* name_;
  dim3 blocks_, threads_;
  std::size_t shared_bytes_;
  bool cooperative_;
  const std::function<void()>& body_;
  std::mt19937_64 random_;
  std::string error_;
  Context scheduler_;
  std::deque<Fiber*> ready_;
  std::vector<Block*> together_;
  std::size_t grid_threads_ = 0, at_grid_ = 0;
  std::size_t stacks_used_ = 0;
  std::vector<void*> thread_sanitizer_fibers_;
  std::vector<std::unique_ptr<Block>> finished_;
  char begin_order_ = 0, end_order_ = 0, grid_order_ = 0;
};

}  // namespace

void set_seed(std::uint64_t seed) { chosen_seed = seed; }
bool copies_at_once() { return chosen_seed % 3 == 1; }
std::size_t shared_memory_limit() { return shared_limit; }
void set_shared_memory_limit(std::size_t bytes) { shared_limit = std::min(bytes, kLargestSharedMemory); }

void launch(const char* name, dim3 blocks, dim3 threads, std::size_t shared_bytes, bool cooperative,
            const std::function<void()>& body) {
  const unsigned count = threads.x * threads.y * threads.z;
  if (count == 0 || count > kMaxThreads || blocks.x * blocks.y * blocks.z == 0) {
    throw cuda::LaunchError(name, "invalid configuration argument");
  }
  if (shared_bytes > kLargestSharedMemory) throw cuda::LaunchError(name, "too much shared memory");
  if (cooperative && blocks.x * blocks.y * blocks.z > kCooperativeBlocks) {
    throw cuda::LaunchError(name, "too many blocks in cooperative launch");
  }
  Launch(name, blocks, threads, shared_bytes, cooperative, body).run();
}

const Position& position() { return current->position; }

void block_barrier() {
  const Aside aside;
  Block& block = *current->block;
  release_order(&block.block_order);
  if (++block.at_barrier == block.live) {
    running->release_block(block);
  } else {
    running->wait(State::at_block);
  }
  acquire_order(&block.block_order);
}

void grid_barrier() {
  const Aside aside;
  running->arrive_at_grid();
}

const std::uint64_t* warp_exchange(std::uint32_t mask, std::uint64_t value) {
  const Aside aside;
  Fiber& me = *current;
  Block& block = *me.block;
  const unsigned warp = me.rank / kLanes;
  Fiber* const lanes = block.fibers.data() + warp * kLanes;
  if ((mask >> me.position.lane & 1u) == 0) running->fail("a warp function was called by a lane outside its mask");
  if ((mask & ~block.live_lanes[warp]) != 0) running->fail("a warp function waits for a lane that has exited");
  release_order(&block.warp_order[warp]);
  me.mask = mask;
  me.value = value;
  bool all = true;
  for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const Fiber& other = lanes[__builtin_ctz(rest)];
    if (other.mask != 0 && other.mask != mask) running->fail("lanes of a warp function disagree about its mask");
    all = all && other.mask == mask;
  }
  if (all) {
    std::vector<Fiber*> others;
    for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      Fiber& lane = lanes[__builtin_ctz(rest)];
      for (std::uint32_t from = mask; from != 0; from &= from - 1) {
        lane.received[__builtin_ctz(from)] = lanes[__builtin_ctz(from)].value;
      }
      lane.mask = 0;
      if (&lane != &me) others.push_back(&lane);
    }
    running->make_ready(std::move(others));
  } else {
    running->wait(State::at_warp);
  }
  acquire_order(&block.warp_order[warp]);
  return me.received;
}

void* shared_array(const void* key, std::size_t bytes) {
  const Aside aside;
  auto& arrays = current->block->arrays;
  for (const auto& [known, memory] : arrays) {
    if (known == key) return memory.get();
  }
  Block& block = *current->block;
  block.static_bytes += bytes;
  if (block.static_bytes + block.dynamic_bytes > kLargestSharedMemory) running->fail("too much shared memory");
  arrays.emplace_back(key, poisoned(bytes));
  return arrays.back().second.get();
}

void* dynamic_shared() { return current->block->dynamic.get(); }

void fail(const char* message) {
  const Aside aside;
  running->fail(message);
}

std::uint32_t shared_address(const void* pointer) {
  return kDynamicSharedBegin +
         static_cast<std::uint32_t>(static_cast<const unsigned char*>(pointer) - current->block->dynamic.get());
}

void note_write(const void* to, std::size_t bytes) {
  const Aside aside;
  Block& block = *current->block;
  const std::size_t begin = shared_address(to) - kDynamicSharedBegin;
  for (std::size_t piece = begin / kFenceBytes; piece * kFenceBytes < begin + bytes; ++piece) {
    ++block.unfenced_stores[piece];
    current->unfenced.push_back(static_cast<std::uint32_t>(piece));
  }
}

void fence_writes() {
  const Aside aside;
  for (const std::uint32_t piece : current->unfenced) --current->block->unfenced_stores[piece];
  current->unfenced.clear();
}

const void* read_by_tensor_core(std::uint32_t address, std::size_t bytes) {
  const Block& block = *current->block;
  const std::size_t begin = address - kDynamicSharedBegin;
  if (address < kDynamicSharedBegin || begin + bytes > block.dynamic_bytes) {
    fail("a tensor core reads outside the block's dynamic shared memory");
  }
  if (block.unfenced_stores[begin / kFenceBytes] != 0) {
    fail("a tensor core reads what was stored without fence.proxy.async");
  }
  return block.dynamic.get() + begin;
}

}  // namespace mudsc::cuda_sim
