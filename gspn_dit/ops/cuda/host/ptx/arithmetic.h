// The arithmetic of PTX instructions, one CUDA thread at a time (PTX ISA, chapter 9.7).
#pragma once

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../host_cuda.h"

namespace ptx {

template <typename To, typename From>
inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

// What a register holds before anything is written to it: NaN, or a number that is no address.
template <typename T>
inline T undefined() {
    T result;
    std::memset(&result, 0xff, sizeof(T));
    return result;
}

// .ftz: subnormal numbers are zeros of their sign.
inline float flush(float value) {
    const uint32_t word = bits<uint32_t>(value);
    return word & 0x7f800000u ? value : bits<float>(word & 0x80000000u);
}

template <typename T>
inline bool ordered(T a, T b) {
    return !std::isnan(a) && !std::isnan(b);
}
template <typename T>
inline T smaller(T a, T b) {
    return std::isnan(a) ? b : std::isnan(b) ? a : a < b || (a == b && std::signbit(a)) ? a : b;
}
template <typename T>
inline T larger(T a, T b) {
    return std::isnan(a) ? b : std::isnan(b) ? a : a > b || (a == b && !std::signbit(a)) ? a : b;
}
inline float saturate(float value) { return value >= 1 ? 1.0f : value > 0 ? value : 0.0f; }

// Fast approximations: exact here, with the documented values where the hardware's leave the exact ones altogether.
inline float divide_approximately(float a, float b) {
    const float size = std::fabs(b);
    if (size > 0x1p126f && std::isfinite(b)) return std::isinf(a) ? NAN : std::copysign(0.0f, a * b);
    return a / b;
}

// Directed rounding of one operation.
template <int MODE, typename F>
__attribute__((noinline)) auto rounded(F operation) {
    const int before = std::fegetround();
    std::fesetround(MODE);
    const volatile auto result = operation();
    std::fesetround(before);
    return static_cast<std::remove_cv_t<decltype(result)>>(result);
}

// Float to integer: saturating, NaN to 0 (in 64 bits as in 32).
template <typename To, typename From>
inline To to_integer(From value) {
    if (std::isnan(value)) return 0;
    const double wide = value;
    if (wide <= static_cast<double>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
    if (wide >= static_cast<double>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
    return static_cast<To>(wide);
}
template <typename To, typename From>
inline To clamp_integer(From value) {
    if (std::is_signed_v<From> && value < 0) {
        if (!std::is_signed_v<To>) return 0;
        const int64_t least = static_cast<int64_t>(std::numeric_limits<To>::min());
        return static_cast<int64_t>(value) < least ? std::numeric_limits<To>::min() : static_cast<To>(value);
    }
    const uint64_t most = static_cast<uint64_t>(std::numeric_limits<To>::max());
    return static_cast<uint64_t>(value) > most ? std::numeric_limits<To>::max() : static_cast<To>(value);
}

// Integers: shifts by more than the width are defined, and bits are picked.
template <typename T>
inline T shift_left(T value, uint32_t by) {
    return by >= 8 * sizeof(T) ? T(0) : static_cast<T>(std::make_unsigned_t<T>(value) << by);
}
template <typename T>
inline T shift_right(T value, uint32_t by) {
    if (by >= 8 * sizeof(T)) by = 8 * sizeof(T) - 1, value = std::is_signed_v<T> ? value : T(0);
    return static_cast<T>(value >> by);
}
template <typename T>
inline T divide(T a, T b) {
    if (b == 0) host_cuda::fail("a division by zero");
    return static_cast<T>(a / b);
}
template <typename T>
inline T remainder(T a, T b) {
    if (b == 0) host_cuda::fail("a division by zero");
    return static_cast<T>(a % b);
}
template <typename T>
inline T multiply_high(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> (8 * sizeof(T)));
}
inline uint32_t funnel(uint32_t low, uint32_t high, uint32_t by, bool left, bool clamps) {
    by = clamps ? std::min(by, 32u) : by & 31;
    const uint64_t both = uint64_t(high) << 32 | low;
    return static_cast<uint32_t>(left ? both << by >> 32 : both >> by);
}
inline uint32_t logic(uint32_t a, uint32_t b, uint32_t c, unsigned table) {
    uint32_t result = 0;
    for (unsigned i = 0; i < 8; ++i) {
        if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    }
    return result;
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned pick = selector >> (4 * i) & 15;
        uint32_t byte = bytes >> (8 * (pick & 7)) & 0xff;
        if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}
template <typename T>
inline T extract(T value, uint32_t position, uint32_t length) {
    position &= 0xff, length &= 0xff;
    const std::make_unsigned_t<T> whole = value;
    const uint32_t width = 8 * sizeof(T);
    const uint32_t last = std::min(position + length - 1, width - 1);
    const bool is_negative = std::is_signed_v<T> && length != 0 && (whole >> last & 1);
    std::make_unsigned_t<T> result = is_negative ? ~std::make_unsigned_t<T>(0) : 0;
    for (uint32_t i = 0; i < std::min(length, width); ++i) {
        const bool bit = position + i < width ? whole >> (position + i) & 1 : is_negative;
        result = bit ? result | std::make_unsigned_t<T>(1) << i : result & ~(std::make_unsigned_t<T>(1) << i);
    }
    return static_cast<T>(result);
}
template <typename T>
inline T insert(T field, T into, uint32_t position, uint32_t length) {
    for (uint32_t i = 0; i < (length & 0xff) && (position & 0xff) + i < 8 * sizeof(T); ++i) {
        const T place = T(1) << ((position & 0xff) + i);
        into = field >> i & 1 ? into | place : into & ~place;
    }
    return into;
}
template <typename T>
inline T reverse(T value) {
    T result = 0;
    for (unsigned i = 0; i < 8 * sizeof(T); ++i) result |= (value >> i & 1) << (8 * sizeof(T) - 1 - i);
    return result;
}

// Numbers of 16 bits: computed in double, rounded once, to nearest with ties to even.
struct Half {
    static float widen(uint16_t word) { return static_cast<float>(bits<_Float16>(word)); }
    static uint16_t narrow(double value) { return bits<uint16_t>(static_cast<_Float16>(value)); }
};
struct Brain {
    static float widen(uint16_t word) { return bits<float>(uint32_t(word) << 16); }
    static uint16_t narrow(double value) {
        if (std::isnan(value)) return 0x7fff;
        // Round to odd first, so that rounding a second time to fewer bits is as good as rounding once.
        uint32_t word = bits<uint32_t>(static_cast<float>(value));
        const double back = bits<float>(word);
        if (back != value && !(word & 1)) word += std::fabs(back) > std::fabs(value) ? uint32_t(-1) : 1u;
        return static_cast<uint16_t>((word + 0x7fffu + (word >> 16 & 1)) >> 16);
    }
};
template <typename Format, typename Word, typename F, typename... Words>
inline Word by_halves(F operation, Words... words) {
    Word result = 0;
    for (unsigned at = 0; at < 8 * sizeof(Word); at += 16) {
        const double value = operation(static_cast<double>(Format::widen(static_cast<uint16_t>(words >> at)))...);
        result = static_cast<Word>(result | static_cast<Word>(Format::narrow(value)) << at);
    }
    return result;
}

}  // namespace ptx
