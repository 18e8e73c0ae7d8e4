// The state of an mbarrier: how many arrivals and bytes its phase still waits for. The hardware's is opaque; this one
// has the same 64 bits and the same rules (PTX ISA, "mbarrier"), and says what is wrong with a transition.
#pragma once

#include <cstdint>

namespace host_cuda {

struct MbarrierState {
    int bytes;          // announced and still to come, or less than none where they came first
    unsigned pending;   // arrivals that are still to come
    unsigned count;     // arrivals of every phase
    unsigned phase;     // 0 and 1 in turn
    bool is_started;

    static constexpr unsigned MOST = (1u << 20) - 1;

    explicit MbarrierState(uint64_t bits)
        : bytes(static_cast<int>(bits & 0x1fffff) - (1 << 20)),
          pending(static_cast<unsigned>(bits >> 21 & MOST)),
          count(static_cast<unsigned>(bits >> 41 & MOST)),
          phase(static_cast<unsigned>(bits >> 61 & 1)),
          is_started(bits >> 62 == 1) {}
    uint64_t bits() const {
        return static_cast<uint64_t>(bytes + (1 << 20)) | uint64_t(pending) << 21 | uint64_t(count) << 41 |
               uint64_t(phase) << 61 | uint64_t(1) << 62;
    }
    static uint64_t start(unsigned count) {
        MbarrierState state(0);
        state.bytes = 0;
        state.pending = state.count = count;
        state.phase = 0;
        return state.bits();
    }
    // Arrivals, and bytes announced (or, where negative, in). Returns what is wrong, or null.
    const char* change(unsigned arrivals, int more_bytes) {
        if (!is_started) return "an mbarrier is used before it is initialised";
        if (arrivals > pending) return "an mbarrier has more arrivals than it counts";
        pending -= arrivals;
        bytes += more_bytes;
        if (bytes <= -(1 << 20) || bytes >= 1 << 20) return "an mbarrier expects too many bytes";
        if (pending == 0 && bytes < 0) return "an mbarrier gets more bytes than it expects";
        if (pending == 0 && bytes == 0) {
            phase ^= 1;
            pending = count;
        }
        return nullptr;
    }
};

}  // namespace host_cuda
