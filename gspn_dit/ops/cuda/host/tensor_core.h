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
