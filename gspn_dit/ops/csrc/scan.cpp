// Entry points: choose the instruction set, cut a call into tasks, run them on torch's OpenMP threads.
#include "scan.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

namespace gspn {
namespace {

const Kernels& kernels() {
#ifdef GSPN_X86
  static const Kernels* chosen = [] {
    const char* limit = getenv("GSPN_CPU_ISA");  // "baseline" or "avx2": for tests and measurements
    const bool avx2 = !limit || limit[0] != 'b', avx512 = !limit;
    __builtin_cpu_init();
    if (avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return &kAvx512Kernels;
    if (avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      return &kAvx2Kernels;
    return &kBaselineKernels;
  }();
  return *chosen;
#else
  return kBaselineKernels;
#endif
}

// Threads of the parent do not exist in a forked child, and waiting for them would never end: a child works alone.
pid_t loaded_by = getpid();

struct Scratch {
  char* data;
  explicit Scratch(int64_t bytes) : data(nullptr) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, (size_t)std::max<int64_t>(bytes, 64)) == 0) data = (char*)memory;
  }
  ~Scratch() { free(data); }
};

// Tasks are handed out by a counter; what they compute does not depend on who computes it.
struct Job {
  const Scan* scan;
  const Plan* plan;
  int64_t tasks, scratch_bytes;
  void (*run)(const Job&, int64_t task, char* scratch);
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
};

void work(void* argument) {
  Job& job = *(Job*)argument;
  Scratch scratch(job.scratch_bytes);
  if (!scratch.data) {
    job.out_of_memory = true;
    return;
  }
  for (int64_t task; (task = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;)
    job.run(job, task, scratch.data);
}

typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);

int run(Job& job) {
  const int64_t threads = std::min(job.scan->threads, job.tasks);
  if (threads <= 1 || getpid() != loaded_by) {
    work(&job);
  } else if (job.scan->parallel) {
    ((GompParallel)job.scan->parallel)(work, &job, (unsigned)threads, 0);
  } else {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(work, &job);
    work(&job);
    for (auto& other : others) other.join();
  }
  return job.out_of_memory ? 1 : 0;
}

// Blocks of channels: whole groups where weights are shared and groups are small, else equal parts of a group.
Plan make_plan(const Scan& scan, int64_t wanted) {
  Plan plan = {};
  const int64_t group = scan.groups == scan.channels ? 1 : scan.channels / scan.groups;
  plan.parts = 1;
  if (group == 1) {
    plan.block = std::min(scan.channels, std::max<int64_t>(16, wanted / 16 * 16));
  } else if (group <= wanted) {
    plan.block = std::min(scan.channels, wanted / group * group);
  } else {
    plan.block = group;
    for (int64_t parts = group / wanted; parts > 1; --parts)
      if (group % parts == 0 && group / parts >= 16) {
        plan.block = group / parts;
        plan.parts = parts;
        break;
      }
  }
  plan.blocks = (scan.channels + plan.block - 1) / plan.block;
  return plan;
}

Block block_of(const Job& job, int64_t task) {
  const Plan& plan = *job.plan;
  Block block;
  block.batch = task / plan.blocks;
  block.channel = task % plan.blocks * plan.block;
  block.channels = std::min(plan.block, job.scan->channels - block.channel);
  block.part = plan.parts > 1 ? task % plan.blocks % plan.parts : 0;
  return block;
}

int64_t wanted_block(const Scan& scan) {
  const char* forced = getenv("GSPN_CPU_BLOCK");
  if (forced) return atoll(forced);
  return 64;
}

}  // namespace
}  // namespace gspn

using namespace gspn;

extern "C" {

int64_t gspn_interface() { return (int64_t)sizeof(Scan) * 1000 + 1; }

const char* gspn_instruction_set() { return kernels().name; }

// Return 0, or 1 if scratch memory could not be had.
int gspn_scan_forward(const Scan* scan) {
  const Plan plan = make_plan(*scan, wanted_block(*scan));
  Job job;
  job.scan = scan;
  job.plan = &plan;
  job.tasks = scan->batch * plan.blocks;
  job.scratch_bytes = kernels().forward_scratch(*scan, plan);
  job.run = [](const Job& job, int64_t task, char* scratch) {
    kernels().forward(*job.scan, *job.plan, block_of(job, task), scratch);
  };
  return run(job);
}

int gspn_scan_backward(const Scan* scan) {
  Plan plan = make_plan(*scan, wanted_block(*scan));
  const int64_t logits = scan->batch * scan->height * scan->width * scan->directions * 3 * scan->groups;
  const int64_t sums = scan->batch * scan->directions * scan->channels;
  Scratch merge_sums(sums * (int64_t)sizeof(double));
  Scratch logit_parts(plan.parts > 1 ? plan.parts * logits * (scan->dtype == kFloat64 ? 8 : 4) : 0);
  if (!merge_sums.data || !logit_parts.data) return 1;
  plan.merge_sums = (double*)merge_sums.data;
  plan.logit_parts = logit_parts.data;
  Job job;
  job.scan = scan;
  job.plan = &plan;
  job.tasks = scan->batch * plan.blocks;
  job.scratch_bytes = kernels().backward_scratch(*scan, plan);
  job.run = [](const Job& job, int64_t task, char* scratch) {
    kernels().backward(*job.scan, *job.plan, block_of(job, task), scratch);
  };
  if (run(job)) return 1;
  for (int64_t d = 0; d < scan->directions; ++d) {
    double sum = 0;
    for (int64_t b = 0; b < scan->batch; ++b)
      for (int64_t c = 0; c < scan->channels; ++c)
        sum += plan.merge_sums[(b * scan->directions + d) * scan->channels + c];
    scan->grad_merge[d] = sum;
  }
  if (plan.parts > 1) {
    Job join;
    join.scan = scan;
    join.plan = &plan;
    join.tasks = (logits + 65535) / 65536;
    join.scratch_bytes = 0;
    join.run = [](const Job& job, int64_t task, char*) {
      const Scan& scan = *job.scan;
      const int64_t logits = scan.batch * scan.height * scan.width * scan.directions * 3 * scan.groups;
      kernels().join_parts(scan, *job.plan, task * 65536, std::min(logits, (task + 1) * 65536));
    };
    return run(join);
  }
  return 0;
}

}  // extern "C"
