#include "memory.h"

#include <array>
#include <deque>
#include <utility>
#include <vector>

#include "../runtime.h"

namespace ptx {

using host_cuda::current;
using host_cuda::fail;

const unsigned char* parameters = nullptr;
uint64_t parameter_bytes = 0;

namespace {

bool unwritten_fails = true;

// What the launch may touch in global memory, as the caller of the library says.
std::vector<std::pair<uint64_t, uint64_t>> ranges;

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    unsigned bytes, source_bytes;
};

// What is known of a block beyond its bytes: which of them were written, and each thread's copies under way.
struct Block {
    std::vector<unsigned char> written;
    std::vector<std::deque<std::vector<Copy>>> groups;  // by threads; the last group is not committed
};
std::vector<Block> known;

const char* name_of(Space space) {
    constexpr const char* NAMES[] = {"generic", "global", "constant", "parameter", "local", "shared", "shared"};
    return NAMES[static_cast<int>(space)];
}

bool is_inside(uint64_t address, unsigned bytes, uint64_t begin, uint64_t length) {
    return address >= begin && address - begin + bytes <= length;
}

uint64_t base_of(unsigned rank) {
    return reinterpret_cast<uint64_t>(host_cuda::in_block(current->shared, static_cast<int>(rank)));
}

// The block that a generic address lies in the shared memory of, or how many there are.
unsigned block_of(uint64_t address) {
    for (unsigned turn = 0; turn < host_cuda::blocks; ++turn) {
        const unsigned rank = (current->rank + turn) % host_cuda::blocks;
        if (address - base_of(rank) < host_cuda::shared_bytes()) return rank;
    }
    return host_cuda::blocks;
}

unsigned char* in_shared(unsigned rank, uint64_t offset, unsigned bytes, bool writes, int line) {
    if (offset + bytes > host_cuda::shared_bytes()) {
        fail("line %d: %u bytes at %llu of %llu bytes of shared memory", line, bytes,
             static_cast<unsigned long long>(offset), static_cast<unsigned long long>(host_cuda::shared_bytes()));
    }
    if (!host_cuda::is_alive(rank)) fail("line %d: the shared memory of a block that has ended", line);
    unsigned char* written = known[rank].written.data() + offset;
    if (writes) {
        std::memset(written, 1, bytes);
    } else if (unwritten_fails && !std::all_of(written, written + bytes, [](unsigned char byte) { return byte != 0; })) {
        fail("line %d: shared memory at %llu that nobody has written", line, static_cast<unsigned long long>(offset));
    }
    return reinterpret_cast<unsigned char*>(base_of(rank)) + offset;
}

unsigned char* in_window(Space space, uint64_t address, unsigned bytes, bool writes, int line) {
    const uint64_t rank = address / RANK_UNIT, offset = address % RANK_UNIT;
    if (rank > host_cuda::blocks || offset < FIRST || (rank != 0 && space == Space::shared)) {
        fail("line %d: %#llx is no address in the shared window", line, static_cast<unsigned long long>(address));
    }
    return in_shared(rank == 0 ? current->rank : static_cast<unsigned>(rank - 1), offset - FIRST, bytes, writes, line);
}

std::deque<std::vector<Copy>>& copies_of_thread() {
    auto& groups = known[current->rank].groups[current->linear];
    if (groups.empty()) groups.emplace_back();
    return groups;
}

}  // namespace

extern "C" void host_cuda_memory(const uint64_t* addresses, const uint64_t* lengths, size_t count) {
    ranges.clear();
    for (size_t i = 0; i < count; ++i) ranges.emplace_back(addresses[i], lengths[i]);
}

extern "C" void host_cuda_unwritten_fails(int fails) { unwritten_fails = fails != 0; }

void start_cluster() {
    known.assign(host_cuda::blocks, {});
    for (Block& block : known) {
        block.written.assign(host_cuda::shared_bytes(), 0);
        block.groups.resize(host_cuda::threads());
    }
}

unsigned char* resolve(Space space, uint64_t address, unsigned bytes, unsigned alignment, bool writes, int line) {
    if (address % alignment != 0) {
        fail("line %d: %u bytes of %s memory at %#llx, which is not aligned", line, bytes, name_of(space),
             static_cast<unsigned long long>(address));
    }
    if (space == Space::shared || space == Space::cluster) return in_window(space, address, bytes, writes, line);
    if (space == Space::generic) {
        const unsigned rank = block_of(address);
        if (rank < host_cuda::blocks) return in_shared(rank, address - base_of(rank), bytes, writes, line);
    }
    if (space == Space::local || space == Space::constant) return reinterpret_cast<unsigned char*>(address);
    const uint64_t begin = reinterpret_cast<uint64_t>(parameters);
    if ((space == Space::parameter || space == Space::generic) && !writes &&
        is_inside(address, bytes, begin, parameter_bytes)) {
        return reinterpret_cast<unsigned char*>(address);
    }
    if (space != Space::parameter) {
        for (size_t i = 0; i < ranges.size(); ++i) {
            if (!is_inside(address, bytes, ranges[i].first, ranges[i].second)) continue;
            if (i > 0) std::swap(ranges[i], ranges[i / 2]);  // what is used most comes first
            return reinterpret_cast<unsigned char*>(address);
        }
    }
    fail("line %d: %u bytes of %s memory at %#llx, which is in no tensor", line, bytes, name_of(space),
         static_cast<unsigned long long>(address));
}

uint64_t shared_to_generic(uint64_t address, int line) {
    const uint64_t rank = address / RANK_UNIT, offset = address % RANK_UNIT;
    if (rank > host_cuda::blocks || offset < FIRST) fail("line %d: no address in the shared window", line);
    return base_of(rank == 0 ? current->rank : static_cast<unsigned>(rank - 1)) + offset - FIRST;
}

uint64_t generic_to_shared(uint64_t address, int line) {
    const unsigned rank = block_of(address);
    if (rank == host_cuda::blocks) fail("line %d: a generic address outside of shared memory", line);
    const uint64_t offset = address - base_of(rank) + FIRST;
    return rank == current->rank ? offset : (rank + 1) * RANK_UNIT + offset;
}

uint64_t in_block_of(uint64_t address, uint32_t rank, bool is_generic, int line) {
    if (rank >= host_cuda::blocks) return 0;  // no address: what uses it fails
    const uint64_t offset = (is_generic ? generic_to_shared(address, line) : address) % RANK_UNIT;
    return is_generic ? base_of(rank) + offset - FIRST : (uint64_t(rank) + 1) * RANK_UNIT + offset;
}

uint64_t* mbarrier(Space space, uint64_t address, int line) {
    current->line = line;
    return reinterpret_cast<uint64_t*>(resolve(space, address, 8, 8, false, line));
}

void start_mbarrier(Space space, uint64_t address, uint32_t count, int line) {
    host_cuda::start_arrivals(reinterpret_cast<uint64_t*>(resolve(space, address, 8, 8, true, line)), count);
}

uint64_t arrive(Space space, uint64_t address, uint32_t count, uint32_t expected_bytes, int line) {
    uint64_t* arrivals = mbarrier(space, address, line);
    const uint64_t before = *arrivals;
    // What is expected is expected of the phase that the arrival may complete.
    if (expected_bytes != 0) host_cuda::arrive(arrivals, 0, static_cast<int>(expected_bytes));
    if (count != 0) host_cuda::arrive(arrivals, count, 0);
    return before;
}

bool await_phase(Space space, uint64_t address, unsigned phase, int line) {
    host_cuda::await(mbarrier(space, address, line), phase);
    return true;
}

bool is_complete(Space space, uint64_t address, unsigned phase, int line) {
    const uint64_t* arrivals = mbarrier(space, address, line);
    const bool complete = host_cuda::is_complete(arrivals, phase);
    if (!complete) host_cuda::step_aside();
    return complete;
}

void copy_async(uint64_t shared, Space space, uint64_t global, unsigned bytes, unsigned source_bytes, int line) {
    if (source_bytes > bytes) fail("line %d: a copy of %u bytes out of %u", line, bytes, source_bytes);
    unsigned char* to = resolve(Space::shared, shared, bytes, bytes, true, line);
    if (global % bytes != 0) fail("line %d: a copy from %#llx, which is not aligned", line,
                                  static_cast<unsigned long long>(global));
    const unsigned char* from =
        source_bytes == 0 ? nullptr : resolve(space, global, source_bytes, 1, false, line);
    unsigned char* base = reinterpret_cast<unsigned char*>(base_of(current->rank));
    std::memset(known[current->rank].written.data() + (to - base), 0, bytes);
    copies_of_thread().back().push_back({to, from, bytes, source_bytes});
}

void commit_copies() { copies_of_thread().emplace_back(); }

void await_copies(unsigned groups_left) {
    auto& groups = copies_of_thread();
    const unsigned char* base = reinterpret_cast<unsigned char*>(base_of(current->rank));
    while (groups.size() > groups_left + 1) {
        for (const Copy& copy : groups.front()) {
            std::memset(copy.to, 0, copy.bytes);
            if (copy.source_bytes > 0) std::memcpy(copy.to, copy.from, copy.source_bytes);
            std::memset(known[current->rank].written.data() + (copy.to - base), 1, copy.bytes);
        }
        groups.pop_front();
    }
}

void copy_bulk(uint64_t shared, uint64_t global, uint32_t bytes, uint64_t arrivals, int line) {
    if (bytes % 16 != 0) fail("line %d: a bulk copy of %u bytes", line, bytes);
    const unsigned char* from = resolve(Space::global, global, bytes, 16, false, line);
    unsigned char* to = resolve(Space::cluster, shared, bytes, 16, true, line);
    uint64_t* counter = mbarrier(Space::cluster, arrivals, line);
    host_cuda::later([=] {
        std::memcpy(to, from, bytes);
        host_cuda::complete(counter, static_cast<int>(bytes));
    });
}

void store_async(uint64_t shared, const void* items, unsigned bytes, uint64_t arrivals, int line) {
    if (shared / RANK_UNIT != arrivals / RANK_UNIT) fail("line %d: a store and its mbarrier in two blocks", line);
    uint64_t* counter = mbarrier(Space::cluster, arrivals, line);
    resolve(Space::cluster, shared, bytes, bytes, true, line);
    const unsigned rank = static_cast<unsigned>(shared / RANK_UNIT) - 1;
    const uint64_t offset = shared % RANK_UNIT - FIRST;
    unsigned char* written = known[rank].written.data() + offset;
    unsigned char* to = reinterpret_cast<unsigned char*>(base_of(rank)) + offset;
    std::memset(written, 0, bytes);
    std::array<unsigned char, 16> values{};
    std::memcpy(values.data(), items, bytes);
    host_cuda::later([=] {
        std::memcpy(to, values.data(), bytes);
        std::memset(written, 1, bytes);
        host_cuda::complete(counter, static_cast<int>(bytes));
    });
}

}  // namespace ptx
