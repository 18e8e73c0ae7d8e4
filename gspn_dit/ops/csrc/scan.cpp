// Entry points: choose the instruction set, cut a call into tasks, run them on torch's OpenMP threads.
#include "scan.h"
#include "tasks.h"

#include <algorithm>
#if defined(GSPN_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gspn {
namespace {

// Whether the processor has AMX with bfloat16 and the system lets this process use it: it then saves the tiles of threads, too.
bool has_matrices() {
#if defined(GSPN_AMX) && defined(__linux__)
  constexpr unsigned tiles = 1u << 24, bfloat16 = 1u << 22;
  constexpr long request_permission = 0x1023, tile_data = 18;
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & tiles) && (edx & bfloat16) &&
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// The largest instruction set that the processor has; it has the smaller ones too.
InstructionSet best_instruction_set() {
#ifdef GSPN_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return kBaseline;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return has_matrices() ? kAmx : kAvx512;
  return kAvx2;
#else
  return kBaseline;
#endif
}

const Kernels& kernels(const Scan& scan) {
#ifdef GSPN_X86
  if (scan.instruction_set >= kAvx512) return kAvx512Kernels;
  if (scan.instruction_set == kAvx2) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

struct Call {
  const Scan& scan;
  const Plan& plan;
};

int run(const Call& call, int64_t tasks, int64_t scratch_bytes, TaskFunction function) {
  return run_tasks({call.scan.threads, call.scan.parallel}, tasks, scratch_bytes, function, &call);
}

// Channels per task. Memory wants long runs of channels (`reads` in the report of benchmarks/scan.py), so there are as few
// blocks as keep the threads busy, and a single image shares out its directions first, unless its rows are long enough to be
// cut.
// Where a choice changes the order of a sum, the shape of a sample alone decides.
int64_t item_bytes(const Scan& scan) { return scan.dtype == kFloat64 ? 8 : scan.dtype == kFloat32 ? 4 : 2; }

int64_t wanted_block(const Scan& scan, int64_t shares) {
  const int64_t threads = std::max<int64_t>(1, scan.threads), tasks = scan.batch * shares;
  int64_t blocks = 1;
  while (tasks * blocks < threads || (tasks * blocks % threads && tasks * blocks < 4 * threads)) ++blocks;
  const int64_t longest = std::max(scan.height, scan.width);
  const int64_t fitting = (1 << 20) / (2 * longest * (scan.dtype == kFloat64 ? 8 : 4));  // two lines of states near the core
  return std::min((scan.channels + blocks - 1) / blocks, std::max<int64_t>(64, fitting));
}

Plan make_plan(const Scan& scan) {
  const int64_t longest_shared_row = item_bytes(scan) < 4 ? 2 << 10 : 8 << 10;  // half precision pays with float32 sums
  Plan plan = {};
  plan.parts = 1;
  plan.shares = scan.batch == 1 && scan.directions > 1 && scan.channels * item_bytes(scan) <= longest_shared_row ? 2 : 1;
  const int64_t wanted = std::max<int64_t>(16, scan.block > 0 ? scan.block : wanted_block(scan, plan.shares));
  const int64_t group = scan.groups == scan.channels ? 1 : scan.channels / scan.groups;
  if (group == 1) {
    plan.block = (wanted + 15) / 16 * 16;
  } else if (group <= 1024) {
    plan.block = std::max<int64_t>(1, wanted / group) * group;
  } else {
    plan.block = group;  // the order of the sums over a group must not depend on the threads
    for (int64_t parts = group / 512; parts > 1; --parts)
      if (group % parts == 0) {
        plan.block = group / parts;
        plan.parts = parts;
        break;
      }
  }
  plan.block = std::min(plan.block, scan.channels);
  plan.blocks = (scan.channels + plan.block - 1) / plan.block;
  return plan;
}

Block block_of(const Scan& scan, const Plan& plan, int64_t task) {
  Block block;
  block.share = task % plan.shares;
  task /= plan.shares;
  block.batch = task / plan.blocks;
  block.channel = task % plan.blocks * plan.block;
  block.channels = std::min(plan.block, scan.channels - block.channel);
  block.part = plan.parts > 1 ? task % plan.blocks % plan.parts : 0;
  return block;
}

// Elements per task of what joins sums.
constexpr int64_t kRange = 1 << 16;
constexpr int64_t kKeptBytes = 8 << 20;

int join_sums(const Call& call) {
  const int64_t elements = call.scan.batch * call.scan.height * call.scan.width * call.scan.channels;
  return run(call, (elements + kRange - 1) / kRange, 0, [](const void* context, int64_t task, char*) {
    const auto& [scan, plan] = *(const Call*)context;
    const int64_t end = scan.batch * scan.height * scan.width * scan.channels;
    kernels(scan).join_sums(scan, plan, scan.y ? scan.y : scan.grad_x, task * kRange, std::min(end, (task + 1) * kRange));
  });
}

int64_t logit_count(const Scan& scan) {
  return scan.batch * scan.height * scan.width * scan.directions * 3 * scan.groups;
}

int join_parts(const Call& call) {
  return run(call, (logit_count(call.scan) + kRange - 1) / kRange, 0, [](const void* context, int64_t task, char*) {
    const auto& [scan, plan] = *(const Call*)context;
    kernels(scan).join_parts(scan, plan, task * kRange, std::min(logit_count(scan), (task + 1) * kRange));
  });
}

int64_t sums_bytes(const Scan& scan, const Plan& plan) {
  const int64_t item = scan.dtype == kFloat64 ? 8 : 4;
  return sum_planes(scan, plan) * scan.batch * scan.height * scan.width * scan.channels * item;
}

bool streams(const Scan& scan, const Plan& plan) {
  const int64_t item = item_bytes(scan), D = scan.directions;
  const int64_t bytes = scan.batch * scan.height * scan.width * D * (3 * scan.groups + 2 * scan.channels) * item;
  const uintptr_t outputs =
      (uintptr_t)scan.grad_weight_logits | (uintptr_t)scan.grad_input_gate | (uintptr_t)scan.grad_output_gate;
  const bool aligned = (outputs | (uintptr_t)((scan.channels * item | plan.block * item) / 2)) % 64 == 0;  // whole pairs
  return aligned && bytes >= scan.stream_bytes;
}

// Where they fit in a cache. The shape decides, because the kept weights round differently.
bool keeps(const Scan& scan) {
  const int64_t item = scan.dtype == kFloat64 ? 8 : 4;
  return scan.groups == scan.channels && 4 * scan.height * scan.width * scan.channels * item <= kKeptBytes;
}

}  // namespace
}  // namespace gspn

using namespace gspn;

extern "C" {

int64_t gspn_interface() { return (int64_t)sizeof(Scan) * 1000 + 1; }

int64_t gspn_best_instruction_set() { return best_instruction_set(); }

// Return 0, or 1 if scratch memory could not be had.
int gspn_scan_forward(const Scan* scan) {
  Plan plan = make_plan(*scan);
  Scratch sums(sums_bytes(*scan, plan));
  if (!sums.data) return 1;
  plan.sums = sums.data;
  const Call call{*scan, plan};
  const int64_t tasks = scan->batch * plan.blocks * plan.shares;
  const auto block = [](const void* context, int64_t task, char* scratch) {
    const auto& [scan, plan] = *(const Call*)context;
    kernels(scan).forward(scan, plan, block_of(scan, plan, task), scratch);
  };
  if (run(call, tasks, kernels(*scan).forward_scratch(*scan, plan), block)) return 1;
  return plan.shares > 1 ? join_sums(call) : 0;
}

int gspn_scan_backward(const Scan* scan) {
  Plan plan = make_plan(*scan);
  const int64_t merge_count = scan->batch * scan->directions * scan->channels;
  Scratch merge_sums(merge_count * (int64_t)sizeof(double)), sums(sums_bytes(*scan, plan));
  Scratch logit_parts(plan.parts > 1 ? plan.parts * logit_count(*scan) * (scan->dtype == kFloat64 ? 8 : 4) : 0);
  if (!merge_sums.data || !logit_parts.data || !sums.data) return 1;
  plan.merge_sums = (double*)merge_sums.data;
  plan.logit_parts = logit_parts.data;
  plan.sums = sums.data;
  plan.stream = streams(*scan, plan);
  plan.keep = keeps(*scan);
  const Call call{*scan, plan};
  const int64_t tasks = scan->batch * plan.blocks * plan.shares;
  const auto block = [](const void* context, int64_t task, char* scratch) {
    const auto& [scan, plan] = *(const Call*)context;
    kernels(scan).backward(scan, plan, block_of(scan, plan, task), scratch);
  };
  if (run(call, tasks, kernels(*scan).backward_scratch(*scan, plan), block)) return 1;
  for (int64_t d = 0; d < scan->directions; ++d) {
    double sum = 0;
    for (int64_t b = 0; b < scan->batch; ++b)
      for (int64_t c = 0; c < scan->channels; ++c)
        sum += plan.merge_sums[(b * scan->directions + d) * scan->channels + c];
    scan->grad_merge[d] = sum;
  }
  if (plan.shares > 1 && join_sums(call)) return 1;
  return plan.parts > 1 ? join_parts(call) : 0;
}

}  // extern "C"
