// Scratch memory, and tasks on the OpenMP threads that torch already has.
#pragma once
#include <cstdint>

namespace gspn {

// Memory of at least so many bytes, aligned to 64, not cleared; `data` is null where none could be had. Fresh pages are
// expensive, so a few buffers are kept from call to call.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  Scratch(const Scratch&) = delete;
  ~Scratch();
  char* data = nullptr;

 private:
  struct Buffer;
  friend struct Kept;
  Buffer* buffer = nullptr;
};

// What a task does: the context of the call, the task's number, scratch of the thread that runs it.
typedef void (*TaskFunction)(const void* context, int64_t task, char* scratch);

struct Threads {
  int64_t count;
  void* parallel;  // GOMP_parallel of the OpenMP runtime that torch uses, or null
};

// Run all tasks. They are handed out by a counter; what they compute does not depend on who computes it. Returns 0, or 1 if
// scratch memory could not be had.
int run_tasks(Threads threads, int64_t tasks, int64_t scratch_bytes, TaskFunction function, const void* context);

}  // namespace gspn
