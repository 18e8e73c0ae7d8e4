// The C interface between gspn_dit/ops/cpu/binding.py and the kernels: plain structs and pointers, no Python, no torch.
#pragma once
#include <cstdint>

namespace gspn {

constexpr int kMaxDirections = 4;
enum Dtype : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
enum InstructionSet : int64_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };  // each holds those before it
enum Direction : int64_t { kRight = 0, kLeft = 1, kDown = 2, kUp = 3 };

// One call of the scan. Mirrored field by field by `_Call` in cpu.py. Strides are in elements, of the dimensions in front
// of the innermost one, whose stride is 1. Outputs are contiguous.
struct Scan {
  int64_t batch, height, width, channels, groups, directions;
  int64_t window;  // lines per segment, at least 1
  int64_t dtype;
  int64_t instruction_set;  // one that the processor has
  int64_t threads;
  int64_t block;         // channels per task, or 0 to choose
  int64_t stream_bytes;  // gradients of at least as many bytes are written past the caches
  int64_t direction[kMaxDirections];
  double merge[kMaxDirections];
  int64_t x_stride[3];              // B, H, W
  int64_t grad_y_stride[3];         // B, H, W
  int64_t weight_logits_stride[5];  // B, H, W, D, 3
  int64_t input_gate_stride[4];     // B, H, W, D
  int64_t output_gate_stride[4];    // B, H, W, D
  const void* x;
  const void* weight_logits;
  const void* input_gate;
  const void* output_gate;
  const void* grad_y;
  void* y;             // forward's only output
  void* grad_x;        // the other outputs belong to the backward
  void* grad_weight_logits;
  void* grad_input_gate;
  void* grad_output_gate;
  double* grad_merge;  // [D]
  void* parallel;      // GOMP_parallel of the OpenMP runtime that torch uses, or null
};

// A task: a range of channels of one sample, for a share of the directions. In the backward of shared weights whose group
// is cut into several tasks, `part` numbers the task within its group.
struct Block {
  int64_t batch, channel, channels, share, part;
};

// How a call is cut into tasks, and what the tasks share.
struct Plan {
  int64_t block;           // channels per task, a multiple of 16 unless it is all of them
  int64_t blocks;          // tasks per sample
  int64_t parts;           // tasks per group of shared weights (1: a task has whole groups)
  int64_t shares;          // of the directions, 1 or 2: the second keeps its directions apart, and they are joined at the end
  void* sums;              // [sum_planes, B, H, W, C] in the accumulation type; an output in that type stands for plane 0
  bool stream;             // write gradients past the caches
  bool keep;               // the backward keeps the weights of a direction instead of computing them twice
  double* merge_sums;      // [B, D, C], backward
  void* logit_parts;       // [parts, B, H, W, D, 3, G] in the accumulation type if parts > 1
};

// The second share has the directions from here on.
inline int64_t first_of_second_share(const Scan& scan) { return scan.directions / 2; }
// The first share's sum, then each direction of the second share.
inline int64_t sum_planes(const Scan& scan, const Plan& plan) {
  return plan.shares > 1 ? 1 + scan.directions - first_of_second_share(scan) : 0;
}

// The kernels of one instruction set. Scratch is aligned to 64 bytes and need not be cleared.
struct Kernels {
  int64_t (*forward_scratch)(const Scan&, const Plan&);
  int64_t (*backward_scratch)(const Scan&, const Plan&);
  void (*forward)(const Scan&, const Plan&, const Block&, char* scratch);
  void (*backward)(const Scan&, const Plan&, const Block&, char* scratch);
  void (*join_parts)(const Scan&, const Plan&, int64_t begin, int64_t end);                // range of logits
  void (*join_sums)(const Scan&, const Plan&, void* output, int64_t begin, int64_t end);  // range of x
};

extern const Kernels kBaselineKernels;
#ifdef GSPN_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace gspn
