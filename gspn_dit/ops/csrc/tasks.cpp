#include "tasks.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

namespace gspn {

struct Scratch::Buffer {
  char* data;
  int64_t bytes;
};

struct Kept {
  static constexpr int slots = 16;
  static constexpr int64_t largest = 32 << 20;
  std::atomic<Scratch::Buffer*> buffers[slots];

  Scratch::Buffer* take(int64_t bytes) {
    for (auto& slot : buffers) {
      Scratch::Buffer* found = slot.exchange(nullptr);
      if (found && found->bytes >= bytes) return found;
      drop(found);
    }
    return nullptr;
  }
  void give(Scratch::Buffer* buffer) {
    if (buffer->bytes <= largest)
      for (auto& slot : buffers) {
        Scratch::Buffer* empty = nullptr;
        if (slot.compare_exchange_strong(empty, buffer)) return;
      }
    drop(buffer);
  }
  static void drop(Scratch::Buffer* unwanted) {
    if (unwanted) free(unwanted->data);
    delete unwanted;
  }
};

namespace {

Kept kept;
constexpr int64_t kHugePage = 2 << 20;

// Threads of the parent do not exist in a forked child, and waiting for them would never end: a child works alone.
pid_t loaded_by = getpid();

struct Job {
  int64_t tasks, scratch_bytes;
  TaskFunction function;
  const void* context;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};

  Job(int64_t tasks, int64_t scratch_bytes, TaskFunction function, const void* context)
      : tasks(tasks), scratch_bytes(scratch_bytes), function(function), context(context) {}
};

void work(void* argument) {
  Job& job = *(Job*)argument;
  Scratch scratch(job.scratch_bytes);
  if (!scratch.data) {
    job.out_of_memory = true;
    return;
  }
  for (int64_t task; (task = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;)
    job.function(job.context, task, scratch.data);
}

typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);

}  // namespace

Scratch::Scratch(int64_t bytes) {
  buffer = kept.take(bytes);
  if (!buffer) {
    bytes = std::max<int64_t>(bytes, 4096);
    const int64_t alignment = bytes >= kHugePage ? kHugePage : 64;
    bytes = (bytes + alignment - 1) / alignment * alignment;
    void* memory = nullptr;
    if (posix_memalign(&memory, (size_t)alignment, (size_t)bytes)) return;
#ifdef MADV_HUGEPAGE
    if (alignment == kHugePage) madvise(memory, (size_t)bytes, MADV_HUGEPAGE);
#endif
    buffer = new (std::nothrow) Buffer{(char*)memory, bytes};
    if (!buffer) free(memory);
  }
  if (buffer) data = buffer->data;
}

Scratch::~Scratch() {
  if (buffer) kept.give(buffer);
}

int run_tasks(Threads threads, int64_t tasks, int64_t scratch_bytes, TaskFunction function, const void* context) {
  Job job(tasks, scratch_bytes, function, context);
  const int64_t count = std::min(threads.count, tasks);
  if (count <= 1 || getpid() != loaded_by) {
    work(&job);
  } else if (threads.parallel) {
    ((GompParallel)threads.parallel)(work, &job, (unsigned)count, 0);
  } else {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < count; ++i) others.emplace_back(work, &job);
    work(&job);
    for (auto& other : others) other.join();
  }
  return job.out_of_memory ? 1 : 0;
}

}  // namespace gspn
