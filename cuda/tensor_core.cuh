// Tensor-core products and asynchronous copies, as the PTX manual defines them (compute capability 8.0 and later).
// In the fragments lane 4 g + t holds, with numbers of 16 bits two by two in a word, the lower one first:
//   A [16, 16]  words 0..3: rows g, g+8, g, g+8; columns 2t, 2t+1 of the first 8, twice, then of the last 8, twice
//   B [16, 8]   words 0, 1: column g; rows 2t, 2t+1 of the first 8, then of the last 8
//   C [16, 8]   sums 0..3: row g, columns 2t, 2t+1; row g+8, columns 2t, 2t+1
#pragma once

#include "common.cuh"

#ifndef GSPN_ON_HOST
namespace gspn {

#if GSPN_STORAGE == 2
#define GSPN_PRODUCT(shape) "mma.sync.aligned." shape ".row.col.f32.bf16.bf16.f32 "
#else
#define GSPN_PRODUCT(shape) "mma.sync.aligned." shape ".row.col.f32.f16.f16.f32 "
#endif

#if GSPN_STORAGE >= 2
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(GSPN_PRODUCT("m16n8k16") "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same with 8 columns of A and rows of B.
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[2], unsigned b) {
    asm volatile(GSPN_PRODUCT("m16n8k8") "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Transpose 8 x 8 numbers: lane 4 g + t gives columns 2t, 2t+1 of row g, and gets those of the transposed. Volatile, or
// what a loop transposes anew in each turn is kept beside what it comes from.
__device__ __forceinline__ unsigned transposed(unsigned word) {
    unsigned result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
    return result;
}
// Load four times 8 x 8 numbers from shared memory, transposed: lane 8 m + r says where row r of number m lies.
__device__ __forceinline__ void load_transposed(unsigned (&words)[4], const Element* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
}
#endif

// Copy so many bytes from global to shared memory, or zeros; complete after `await_copies`, and for other threads
// after a barrier behind that.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool active) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "l"(global), "n"(BYTES),
                 "r"(active ? BYTES : 0)
                 : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace gspn
#endif
