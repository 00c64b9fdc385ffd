// CUDA's words for a kernel that a C++ compiler shall run: include before the kernels, then cuda_shim::run_grid.
//
// Blocks run one after the other; each thread of a block is a fiber, which runs until it waits for others. The order of
// blocks, warps and threads is an option: a correct kernel gives the same in all. What a GPU leaves undefined is an
// error here: a barrier or a warp operation that not all threads reach in the same line. Shared memory is filled with
// 0xff before every block, which reads as NaN or -1. Sanitizers see all memory, and know fibers.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)
#define CUDA_SHIM_TEXT_OF(line) #line
#define CUDA_SHIM_TEXT(line) CUDA_SHIM_TEXT_OF(line)
#define CUDA_SHIM_PLACE __FILE__ ":" CUDA_SHIM_TEXT(__LINE__)
#define __syncthreads() ::cuda_shim::wait_for_block(CUDA_SHIM_PLACE)
#define __shfl_sync(mask, value, lane) ::cuda_shim::from_lane(CUDA_SHIM_PLACE, mask, value, lane)
#define __shfl_up_sync(mask, value, step) __shfl_sync(mask, value, ::cuda_shim::lane_below(step))
#define __shfl_xor_sync(mask, value, bits) __shfl_sync(mask, value, ::cuda_shim::lane() ^ (bits))

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline Dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_shim {

constexpr int kWarp = 32;

enum class Order { ascending, descending, random };

struct Options {
  Order order = Order::ascending;
  unsigned seed = 0;
  std::string barrier_left_out;  // FILE:LINE, the end of it, of a __syncthreads() that does nothing: is it missed?
};
inline Options options;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// -- fibers -----------------------------------------------------------------------------------------------------------

enum class State { ready, at_barrier, in_warp, done };

// A stack and a place in its code.
struct Context {
  ucontext_t entry;
  jmp_buf place;
  bool entered = true;

  // Goes on there; returns when somebody comes back.
  void leave_for(Context& to) {
#ifdef __SANITIZE_ADDRESS__
    swapcontext(&entry, &to.entry);
#else  // swapcontext asks the operating system for its signal mask twice: ten times as slow
    if (_setjmp(place)) return;
    if (to.entered) _longjmp(to.place, 1);
    to.entered = true;
    setcontext(&to.entry);
#endif
  }
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  Dim3 index;
  State state;
  const char* place;  // where it waits
  int exchanges;      // of its warp

  static constexpr size_t kStack = 128 << 10;
};

// Tells the address sanitizer that the stack changes.
struct StackChange {
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  void leave(const void* stack, size_t size) { __sanitizer_start_switch_fiber(&fake, stack, size); }
  void arrive(const void** stack = nullptr, size_t* size = nullptr) {
    __sanitizer_finish_switch_fiber(fake, stack, size);
  }
#else
  void leave(const void*, size_t) {}
  void arrive(const void** = nullptr, size_t* = nullptr) {}
#endif
};

class Block {
 public:
  explicit Block(int threads) : fibers_(threads) {
    for (auto& sent : sent_) sent.resize(threads);
    for (auto& fiber : fibers_) fiber.stack.reset(new char[Fiber::kStack]);
  }

  template <typename Kernel>
  void run(const Kernel& kernel, std::mt19937& random) {
    kernel_ = [](const void* k) { (*static_cast<const Kernel*>(k))(); };
    argument_ = &kernel;
    shared_.reset();
    for (size_t i = 0; i < fibers_.size(); ++i) {
      start(fibers_[i]);
      fibers_[i].index = {static_cast<unsigned>(i), 0, 0};
    }
    const int threads = static_cast<int>(fibers_.size());
    do {
      for (const int warp : in_order((threads + kWarp - 1) / kWarp, random))
        run_warp(warp * kWarp, std::min(kWarp, threads - warp * kWarp), random);
      if (all(0, threads, State::done)) return;
    } while (release(0, threads, State::at_barrier));
    throw Error("not all threads of a block or a warp reach the same " + places());
  }

  void wait(State state, const char* place) {
    Fiber& fiber = *current_;
    fiber.state = state;
    fiber.place = place;
    StackChange change;
    change.leave(scheduler_stack_, scheduler_size_);
    fiber.context.leave_for(scheduler_);
    change.arrive();
  }

  // Sends `value` to the warp; returns what each lane has sent, which may be read until the next exchange.
  const uint64_t* exchange(const char* place, unsigned mask, uint64_t value) {
    if (mask != 0xffffffffu || fibers_.size() % kWarp) throw Error("only whole warps are supported");
    auto& sent = sent_[current_->exchanges++ % 2];  // in turn: others may still read the one before
    const auto thread = current_ - fibers_.data();
    sent[thread] = value;
    wait(State::in_warp, place);
    return &sent[thread / kWarp * kWarp];
  }

  int lane() const { return (current_ - fibers_.data()) % kWarp; }

  // The block's shared memory: one object, of exactly its size, not initialised.
  void* shared(size_t size) {
    if (!shared_) {
      shared_.reset(static_cast<char*>(::operator new(size, kAlignment)));
      std::memset(shared_.get(), 0xff, size);
      shared_size_ = size;
    }
    if (shared_size_ != size) throw Error("a kernel has one object of shared memory");
    return shared_.get();
  }

  static inline Block* running = nullptr;

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(char* p) const { ::operator delete(p, kAlignment); }
  };

  void start(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber.stack.get(), Fiber::kStack);  // a fiber may have been left behind by an error
#endif
    fiber.state = State::ready;
    fiber.exchanges = 0;
    ucontext_t& entry = fiber.context.entry;
    getcontext(&entry);
    entry.uc_stack.ss_sp = fiber.stack.get();
    entry.uc_stack.ss_size = Fiber::kStack;
    entry.uc_link = nullptr;
    makecontext(&entry, &Block::enter, 0);
    fiber.context.entered = false;
  }

  static void enter() {
    Block& block = *running;
    StackChange().arrive(&block.scheduler_stack_, &block.scheduler_size_);
    try {
      block.kernel_(block.argument_);
    } catch (...) {
      block.error_ = std::current_exception();
    }
    block.wait(State::done, "");
  }

  void resume(Fiber& fiber) {
    current_ = &fiber;
    running = this;
    threadIdx = fiber.index;
    StackChange change;
    change.leave(fiber.stack.get(), Fiber::kStack);
    scheduler_.leave_for(fiber.context);
    change.arrive();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  // Until all its threads have ended or wait for other warps: one warp may be a barrier ahead of the others.
  void run_warp(int first, int count, std::mt19937& random) {
    do {
      for (const int lane : in_order(count, random))
        if (fibers_[first + lane].state == State::ready) resume(fibers_[first + lane]);
    } while (release(first, count, State::in_warp));
  }

  static std::vector<int> in_order(int count, std::mt19937& random) {
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (options.order == Order::descending) std::reverse(order.begin(), order.end());
    if (options.order == Order::random) std::shuffle(order.begin(), order.end(), random);
    return order;
  }

  bool all(int first, int count, State state) const {
    const auto* fiber = &fibers_[first];
    return std::all_of(fiber, fiber + count,
                       [&](const Fiber& f) { return f.state == state && std::strcmp(f.place, fiber->place) == 0; });
  }

  // Lets threads go on if all of them wait in the same place.
  bool release(int first, int count, State state) {
    if (!all(first, count, state)) return false;
    for (int i = first; i < first + count; ++i) fibers_[i].state = State::ready;
    return true;
  }

  std::string places() const {
    std::string text = "line:";
    std::vector<std::pair<State, std::string>> seen;
    for (const Fiber& fiber : fibers_) {
      const std::pair<State, std::string> place{fiber.state, fiber.place};
      if (std::find(seen.begin(), seen.end(), place) != seen.end()) continue;
      seen.push_back(place);
      text += " thread " + std::to_string(fiber.index.x);
      text += fiber.state == State::done ? " has ended;" : " waits in " + place.second + ";";
    }
    return text;
  }

  std::vector<Fiber> fibers_;
  std::vector<uint64_t> sent_[2];
  std::unique_ptr<char, Free> shared_;
  size_t shared_size_ = 0;
  void (*kernel_)(const void*) = nullptr;
  const void* argument_ = nullptr;
  std::exception_ptr error_;
  Context scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
  Fiber* current_ = nullptr;
};

// -- what a kernel calls ----------------------------------------------------------------------------------------------

inline int lane() { return Block::running->lane(); }
inline int lane_below(int step) { return lane() < step ? lane() : lane() - step; }

inline bool is_left_out(const std::string& place) {
  const std::string& end = options.barrier_left_out;
  return place.size() >= end.size() && place.compare(place.size() - end.size(), end.size(), end) == 0;
}

inline void wait_for_block(const char* place) {
  if (options.barrier_left_out.empty() || !is_left_out(place)) Block::running->wait(State::at_barrier, place);
}

template <typename T>
T from_lane(const char* place, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* sent = Block::running->exchange(place, mask, bits);
  if (source < 0 || source >= kWarp) throw Error("no such lane: " + std::to_string(source));
  std::memcpy(&value, &sent[source], sizeof(T));
  return value;
}

template <typename Memory>
Memory& block_memory() {
  return *static_cast<Memory*>(Block::running->shared(sizeof(Memory)));
}

// kernel<<<grid, threads>>>(arguments...)
template <typename... Parameters, typename... Arguments>
void run_grid(void (*kernel)(Parameters...), Dim3 grid, unsigned threads, const Arguments&... arguments) {
  gridDim = grid;
  blockDim = {threads, 1, 1};
  std::mt19937 random(options.seed);
  std::vector<Dim3> blocks;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, 0});
  if (options.order == Order::descending) std::reverse(blocks.begin(), blocks.end());
  if (options.order == Order::random) std::shuffle(blocks.begin(), blocks.end(), random);
  Block block(static_cast<int>(threads));
  for (const Dim3& index : blocks) {
    blockIdx = index;
    block.run([&] { kernel(arguments...); }, random);
  }
}

}  // namespace cuda_shim
