#include "warp.h"

#include "../runtime.h"

namespace ptx {

using host_cuda::current;
using host_cuda::fail;
using host_cuda::MOST_EXCHANGED;

namespace {

unsigned lane_of_thread() { return current->linear % host_cuda::WARP; }

template <typename T>
T given(const unsigned char* lanes, unsigned lane, unsigned place = 0) {
    T value;
    std::memcpy(&value, lanes + lane * MOST_EXCHANGED + place * sizeof(T), sizeof(T));
    return value;
}

template <typename Format>
double number(const unsigned char* lanes, unsigned lane, unsigned place) {
    return Format::widen(given<uint16_t>(lanes, lane, place));
}

float towards_zero(double sum) {
    const float nearest = static_cast<float>(sum);
    return std::fabs(static_cast<double>(nearest)) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

}  // namespace

Shuffled shuffle(Shuffle mode, uint32_t value, uint32_t by, uint32_t clamp, uint32_t mask, int line) {
    current->line = line;
    const unsigned lane = lane_of_thread(), segment = clamp >> 8 & 31, last = clamp & 31;
    const int most = static_cast<int>((lane & segment) | (last & ~segment)), least = static_cast<int>(lane & segment);
    int source = static_cast<int>(lane);
    bool is_inside = false;
    by &= 31;
    if (mode == Shuffle::up) source -= static_cast<int>(by), is_inside = source >= most;
    if (mode == Shuffle::down) source += static_cast<int>(by), is_inside = source <= most;
    if (mode == Shuffle::butterfly) source ^= static_cast<int>(by), is_inside = source <= most;
    if (mode == Shuffle::index) source = least | static_cast<int>(by & ~segment), is_inside = source <= most;
    const unsigned from = is_inside ? static_cast<unsigned>(source) : lane;
    if (!(mask >> from & 1)) fail("line %d: a shuffle reads lane %u, which the mask lacks", line, from);
    return {given<uint32_t>(host_cuda::exchange(&value, sizeof(value), mask), from), is_inside};
}

uint32_t ballot(bool predicate, uint32_t mask, int line) {
    current->line = line;
    const uint32_t mine = predicate;
    const unsigned char* lanes = host_cuda::exchange(&mine, sizeof(mine), mask);
    uint32_t result = 0;
    for (unsigned lane = 0; lane < host_cuda::WARP; ++lane) {
        if (mask >> lane & 1 && given<uint32_t>(lanes, lane) != 0) result |= 1u << lane;
    }
    return result;
}

template <typename Format, unsigned A_WORDS>
void multiply(float (&d)[4], const uint32_t (&a)[A_WORDS], const uint32_t (&b)[A_WORDS / 2], const float (&c)[4],
              int line) {
    current->line = line;
    uint32_t mine[A_WORDS + A_WORDS / 2];
    std::memcpy(mine, a, sizeof(a));
    std::memcpy(mine + A_WORDS, b, sizeof(b));
    const unsigned char* lanes = host_cuda::exchange(mine, sizeof(mine));
    const unsigned group = lane_of_thread() / 4, in_group = lane_of_thread() % 4;
    for (unsigned i = 0; i < 4; ++i) {
        // Row group or group + 8 and column 2·in_group or the next, of d; lane 4·r + k / 2 holds what row r has at k.
        const unsigned column = 2 * in_group + i % 2;
        double sum = c[i];
        for (unsigned k = 0; k < 4 * A_WORDS; ++k) {
            const unsigned part = k % 8 / 2, half = k % 2, eight = k / 8;
            sum += number<Format>(lanes, 4 * group + part, 2 * (2 * eight + i / 2) + half) *
                   number<Format>(lanes, 4 * column + part, 2 * (A_WORDS + eight) + half);
        }
        d[i] = towards_zero(sum);
    }
}
template void multiply<Half, 2>(float (&)[4], const uint32_t (&)[2], const uint32_t (&)[1], const float (&)[4], int);
template void multiply<Half, 4>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], const float (&)[4], int);
template void multiply<Brain, 2>(float (&)[4], const uint32_t (&)[2], const uint32_t (&)[1], const float (&)[4], int);
template void multiply<Brain, 4>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], const float (&)[4], int);

template <unsigned N>
void load_matrices(uint32_t (&d)[N], uint64_t address, bool transposed, int line) {
    current->line = line;
    const unsigned char* lanes = host_cuda::exchange(&address, sizeof(address));
    const unsigned group = lane_of_thread() / 4, in_group = lane_of_thread() % 4;
    for (unsigned matrix = 0; matrix < N; ++matrix) {
        uint16_t both[2];
        for (unsigned half = 0; half < 2; ++half) {
            const unsigned row = transposed ? 2 * in_group + half : group;
            const unsigned column = transposed ? group : 2 * in_group + half;
            const uint64_t at = given<uint64_t>(lanes, 8 * matrix + row);
            both[half] = reinterpret_cast<const uint16_t*>(resolve(Space::shared, at, 16, 16, false, line))[column];
        }
        d[matrix] = uint32_t(both[1]) << 16 | both[0];
    }
}
template void load_matrices<1>(uint32_t (&)[1], uint64_t, bool, int);
template void load_matrices<2>(uint32_t (&)[2], uint64_t, bool, int);
template void load_matrices<4>(uint32_t (&)[4], uint64_t, bool, int);

template <unsigned N>
void store_matrices(const uint32_t (&values)[N], uint64_t address, bool transposed, int line) {
    current->line = line;
    const unsigned char* lanes = host_cuda::exchange(&address, sizeof(address));
    const unsigned group = lane_of_thread() / 4, in_group = lane_of_thread() % 4;
    for (unsigned matrix = 0; matrix < N; ++matrix) {
        for (unsigned half = 0; half < 2; ++half) {
            const unsigned row = transposed ? 2 * in_group + half : group;
            const unsigned column = transposed ? group : 2 * in_group + half;
            const uint64_t at = given<uint64_t>(lanes, 8 * matrix + row);
            if (at % 16 != 0) fail("line %d: a row of a matrix that is not aligned", line);
            *write<uint16_t>(Space::shared, at + 2 * column, line) = static_cast<uint16_t>(values[matrix] >> 16 * half);
        }
    }
}
template void store_matrices<1>(const uint32_t (&)[1], uint64_t, bool, int);
template void store_matrices<2>(const uint32_t (&)[2], uint64_t, bool, int);
template void store_matrices<4>(const uint32_t (&)[4], uint64_t, bool, int);

uint32_t transpose_matrix(uint32_t word, int line) {
    current->line = line;
    const unsigned char* lanes = host_cuda::exchange(&word, sizeof(word));
    const unsigned group = lane_of_thread() / 4, in_group = lane_of_thread() % 4;
    const auto half = [&](unsigned row) { return given<uint16_t>(lanes, 4 * row + group / 2, group % 2); };
    return uint32_t(half(2 * in_group + 1)) << 16 | half(2 * in_group);
}

}  // namespace ptx
