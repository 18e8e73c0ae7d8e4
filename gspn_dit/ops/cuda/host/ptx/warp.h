// What the lanes of a warp do together: shuffles, votes, and the matrices of the tensor cores (PTX ISA, 9.7.9 and 9.7.15).
#pragma once

#include <cstdint>

#include "memory.h"

namespace ptx {

enum class Shuffle { up, down, butterfly, index };

struct Shuffled {
    uint32_t value;
    bool is_inside;
};
Shuffled shuffle(Shuffle mode, uint32_t value, uint32_t by, uint32_t clamp, uint32_t mask, int line);
// The lanes of the mask whose predicate holds.
uint32_t ballot(bool predicate, uint32_t mask, int line);

// D = A B + C of numbers of 16 bits: A has A_WORDS registers (2 for k = 8, 4 for k = 16), B half of them. Products are
// exact, and sums are cut off towards zero, as those of tensor cores are (Fasi et al., PeerJ CS 7:e330, 2021).
template <typename Format, unsigned A_WORDS>
void multiply(float (&d)[4], const uint32_t (&a)[A_WORDS], const uint32_t (&b)[A_WORDS / 2], const float (&c)[4],
              int line);
// Matrices of 8×8 numbers of 16 bits: lane l gives the address of row l % 8 of matrix l / 8.
template <unsigned N>
void load_matrices(uint32_t (&d)[N], uint64_t address, bool transposed, int line);
template <unsigned N>
void store_matrices(const uint32_t (&values)[N], uint64_t address, bool transposed, int line);
// One of them, from registers to registers.
uint32_t transpose_matrix(uint32_t word, int line);

}  // namespace ptx
