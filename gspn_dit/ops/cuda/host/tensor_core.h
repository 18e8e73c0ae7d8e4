// What tensor_core.cuh says of products and copies, for the host: lanes exchange their fragments.
#pragma once

#include "host_cuda.h"

#include <vector>

namespace gspn {

#if GSPN_STORAGE >= 2
#if GSPN_STORAGE == 2
inline float host_widen(unsigned short bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
#else
inline float host_widen(unsigned short bits) { return half_bits_to_float(bits); }
#endif

// WORDS of A and WORDS / 2 of B per lane; the sums are added in the order of the columns of A.
template <int WORDS>
inline void multiply_add_words(float (&c)[4], const unsigned (&a)[WORDS], const unsigned (&b)[WORDS / 2]) {
    unsigned mine[WORDS + WORDS / 2];
    std::memcpy(mine, a, sizeof(a));
    std::memcpy(mine + WORDS, b, sizeof(b));
    const unsigned char* all = host_cuda::exchange(mine, sizeof(mine));
    const int lane = static_cast<int>(host_cuda::current->linear % 32), g = lane / 4, t = lane % 4;
    const auto number = [&](int from, int word, int half) {
        unsigned short bits;
        std::memcpy(&bits, all + from * host_cuda::MOST_EXCHANGED + word * 4 + half * 2, sizeof(bits));
        return host_widen(bits);
    };
    for (int k = 0; k < 4 * WORDS; ++k) {
        const int eight = k / 8, quarter = k % 8 / 2, half = k % 2;
        for (int i = 0; i < 4; ++i) {
            c[i] += number(4 * g + quarter, 2 * eight + i / 2, half) *
                    number(4 * (2 * t + i % 2) + quarter, WORDS + eight, half);
        }
    }
}
inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_add_words<4>(c, a, {b0, b1});
}
inline void multiply_add(float (&c)[4], const unsigned (&a)[2], unsigned b) { multiply_add_words<2>(c, a, {b}); }

inline unsigned transposed(unsigned word) {
    const unsigned char* all = host_cuda::exchange(&word, sizeof(word));
    const int lane = static_cast<int>(host_cuda::current->linear % 32), g = lane / 4, t = lane % 4;
    unsigned short halves[2];
    for (int j = 0; j < 2; ++j) {  // column g of row 2 t + j
        std::memcpy(&halves[j], all + (4 * (2 * t + j) + g / 2) * int(host_cuda::MOST_EXCHANGED) + g % 2 * 2, 2);
    }
    return halves[0] | static_cast<unsigned>(halves[1]) << 16;
}
inline void load_transposed(unsigned (&words)[4], const unsigned short* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) host_cuda::fail("a row of a matrix that is not aligned");
    const unsigned char* all = host_cuda::exchange(&row, sizeof(row));
    const int lane = static_cast<int>(host_cuda::current->linear % 32), g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; ++m) {
        words[m] = 0;
        for (int j = 0; j < 2; ++j) {
            const unsigned short* from;
            std::memcpy(&from, all + (8 * m + 2 * t + j) * int(host_cuda::MOST_EXCHANGED), sizeof(from));
            words[m] |= static_cast<unsigned>(from[g]) << 16 * j;
        }
    }
}
#endif

template <int BYTES>
inline void copy_async(void* shared, const void* global, bool active) {
    host_cuda::trace(global, BYTES, active);
    if (active) {
        std::memcpy(shared, global, BYTES);
    } else {
        std::memset(shared, 0, BYTES);
    }
}
inline void await_copies() {}

}  // namespace gspn
