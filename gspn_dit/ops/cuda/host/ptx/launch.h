// What a translated module includes, and how it starts its kernels.
#pragma once

#include "arithmetic.h"
#include "memory.h"
#include "warp.h"

namespace ptx {

struct Entry {
    void (*kernel)(const void*);
    unsigned cluster, threads;         // of the kernel's own declaration
    size_t static_bytes, parameter_bytes;
};

// 0, or 2 where the launch failed.
int launch(const Entry& entry, const unsigned* grid, const unsigned* block, size_t shared_bytes, const void* problem);

}  // namespace ptx
