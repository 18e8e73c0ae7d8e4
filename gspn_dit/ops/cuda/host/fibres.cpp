// The CUDA threads of a block, or of a cluster's blocks, as fibres that take turns.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <utility>

#include "mbarrier.h"
#include "runtime.h"

namespace host_cuda {

namespace {

enum class State { ready, at_barrier, at_cluster_barrier, at_warp_barrier, at_arrivals, finished };

struct Fibre {
    ucontext_t entry;
    jmp_buf place;
    State state = State::ready;
    bool started = false;
    void* stack = nullptr;
    const uint64_t* arrivals = nullptr;  // awaited
    unsigned phase = 0;
    unsigned mask = 0;     // of lanes that exchange
    unsigned barrier = 0;  // its name
    bool has_arrived = false;  // at the cluster's barrier, with the number of
    unsigned generation = 0;
};

struct Barrier {
    unsigned arrived = 0, expected = 0;  // threads; 0 expected for all of the block
};

constexpr size_t STACK_BYTES = 1024 * 1024;
constexpr unsigned BARRIERS = 16;
std::vector<std::unique_ptr<Fibre>> fibres;
std::vector<std::array<Barrier, BARRIERS>> barriers;  // of each block
std::vector<unsigned> alive;                          // threads of each block
unsigned running = 0;
unsigned cluster_arrived = 0, cluster_generation = 0;
std::vector<std::function<void()>> on_their_way;
char message[512] = "";

// AddressSanitizer follows swapcontext but not jumps between stacks; jumps need no system call.
#if defined(__SANITIZE_ADDRESS__)
ucontext_t scheduler_entry;
void leave() { swapcontext(&fibres[running]->entry, &scheduler_entry); }
void enter(Fibre& fibre) { swapcontext(&scheduler_entry, &fibre.entry); }
#else
jmp_buf scheduler_place, end_of_launch;
void leave() {
    if (_setjmp(fibres[running]->place) == 0) _longjmp(scheduler_place, 1);
}
void enter(Fibre& fibre) {
    if (_setjmp(scheduler_place) != 0) return;
    if (fibre.started) _longjmp(fibre.place, 1);
    fibre.started = true;
    setcontext(&fibre.entry);
}
#endif

void body() {
    launch.kernel(launch.argument);
    fibres[running]->state = State::finished;
    --alive[current->rank];
    leave();
    std::abort();  // a finished fibre was resumed
}

void wait(State state) {
    fibres[running]->state = state;
    leave();
}

void start_fibres(unsigned count) {
    while (fibres.size() < count) {
        fibres.push_back(std::make_unique<Fibre>());
        fibres.back()->stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (fibres.back()->stack == MAP_FAILED) std::abort();
    }
    for (unsigned i = 0; i < count; ++i) {
        Fibre& fibre = *fibres[i];
        fibre.state = State::ready;
        fibre.started = fibre.has_arrived = false;
        getcontext(&fibre.entry);
        fibre.entry.uc_stack.ss_sp = fibre.stack;
        fibre.entry.uc_stack.ss_size = STACK_BYTES;
        fibre.entry.uc_link = nullptr;
        makecontext(&fibre.entry, body, 0);
    }
    barriers.assign(blocks, {});
    alive.assign(blocks, threads());
    cluster_arrived = cluster_generation = 0;
    on_their_way.clear();
}

bool resume(unsigned i) {
    Fibre& fibre = *fibres[i];
    if (fibre.state == State::at_arrivals && is_complete(fibre.arrivals, fibre.phase)) fibre.state = State::ready;
    if (fibre.state != State::ready) return false;
    running = i;
    current = &contexts[i];
    enter(fibre);
    return true;
}

// What a lane gives, and what the others get of it: all that go on read it before anything is exchanged again.
unsigned char* given_by(unsigned thread) { return place_of_exchange(thread, 0); }
unsigned char* exchanged_by(unsigned thread) { return place_of_exchange(thread, 1); }

// Lanes go on where all that they wait for are there.
bool release_warp(unsigned first) {
    bool any = false;
    for (unsigned i = first; i < first + WARP; ++i) {
        if (fibres[i]->state != State::at_warp_barrier) continue;
        const unsigned mask = fibres[i]->mask;
        bool complete = true;
        for (unsigned lane = 0; lane < WARP && complete; ++lane) {
            const Fibre& other = *fibres[first + lane];
            if (!(mask >> lane & 1) || other.state == State::finished) continue;
            complete = other.state == State::at_warp_barrier && other.mask == mask;
        }
        if (!complete) continue;
        any = true;
        for (unsigned lane = 0; lane < WARP; ++lane) {
            if (!(mask >> lane & 1) || fibres[first + lane]->state != State::at_warp_barrier) continue;
            fibres[first + lane]->state = State::ready;
            std::memcpy(exchanged_by(first + lane), given_by(first + lane), MOST_EXCHANGED);
        }
    }
    return any;
}

bool release_block(unsigned block) {
    bool any = false;
    for (unsigned name = 0; name < BARRIERS; ++name) {
        Barrier& barrier = barriers[block][name];
        if (barrier.arrived == 0 || barrier.arrived < (barrier.expected ? barrier.expected : alive[block])) continue;
        for (unsigned i = block * threads(); i < (block + 1) * threads(); ++i) {
            if (fibres[i]->state == State::at_barrier && fibres[i]->barrier == name) fibres[i]->state = State::ready;
        }
        barrier = {};
        any = true;
    }
    return any;
}

bool release_cluster(unsigned count) {
    unsigned left = 0;
    for (unsigned threads_left : alive) left += threads_left;
    if (cluster_arrived == 0 || cluster_arrived < left) return false;
    cluster_arrived = 0;
    ++cluster_generation;
    for (unsigned i = 0; i < count; ++i) {
        if (fibres[i]->state == State::at_cluster_barrier) fibres[i]->state = State::ready;
    }
    return true;
}

unsigned draw(unsigned below) {
    static uint64_t drawn = 0, seed = 0;
    if (seed != schedule) drawn = seed = schedule;
    drawn = drawn * 6364136223846793005u + 1442695040888963407u;
    return static_cast<unsigned>((drawn >> 33) % below);
}

// One of the copies that are on their way arrives.
bool deliver() {
    std::swap(on_their_way[draw(static_cast<unsigned>(on_their_way.size()))], on_their_way.back());
    const std::function<void()> copy = std::move(on_their_way.back());
    on_their_way.pop_back();
    copy();
    return true;
}

bool take_turns(unsigned count) {
    static std::vector<unsigned> turns;
    turns.resize(count);
    for (unsigned i = 0; i < count; ++i) turns[i] = i;
    for (unsigned i = count; schedule != 0 && i > 1; --i) std::swap(turns[i - 1], turns[draw(i)]);
    bool progress = false;
    for (unsigned i : turns) progress |= resume(i);
    if (!on_their_way.empty() && (!progress || draw(4) == 0)) progress = deliver();
    for (unsigned first = 0; first < count; first += WARP) progress |= release_warp(first);
    for (unsigned block = 0; block < blocks; ++block) progress |= release_block(block);
    return progress | release_cluster(count);
}

// Who waits where once nobody can go on.
void check_finished(unsigned count) {
    constexpr const char* PLACES[] = {"", "a barrier", "the cluster's barrier", "other lanes", "an mbarrier"};
    unsigned waiting[5] = {}, first_line[5] = {};
    for (unsigned i = 0; i < count; ++i) {
        if (fibres[i]->state == State::finished) continue;
        const unsigned place = static_cast<unsigned>(fibres[i]->state);
        if (waiting[place]++ == 0) first_line[place] = static_cast<unsigned>(contexts[i].line);
    }
    char text[400] = "";
    for (unsigned place = 1; place < 5; ++place) {
        if (waiting[place] == 0) continue;
        const size_t used = std::strlen(text);
        std::snprintf(text + used, sizeof(text) - used, "; %u at %s", waiting[place], PLACES[place]);
        if (first_line[place] == 0) continue;
        const size_t longer = std::strlen(text);
        std::snprintf(text + longer, sizeof(text) - longer, " (line %u)", first_line[place]);
    }
    if (text[0] != 0) fail("threads wait for each other%s", text);
}

void change(uint64_t* arrivals, unsigned count, int bytes) {
    MbarrierState state(*arrivals);
    if (const char* wrong = state.change(count, bytes)) fail("%s", wrong);
    *arrivals = state.bits();
}

}  // namespace

void fail(const char* format, ...) {
    std::va_list values;
    va_start(values, format);
    std::vsnprintf(message, sizeof(message), format, values);
    va_end(values);
#if defined(__SANITIZE_ADDRESS__)
    std::fprintf(stderr, "host_cuda: %s\n", message);
    std::abort();
#else
    _longjmp(end_of_launch, 1);
#endif
}

void say(const char* format, ...) {
    std::va_list values;
    va_start(values, format);
    std::vsnprintf(message, sizeof(message), format, values);
    va_end(values);
}

extern "C" const char* host_cuda_message() { return message; }

bool run_blocks() {
    const unsigned count = all_threads();
    start_fibres(count);
#if !defined(__SANITIZE_ADDRESS__)
    if (_setjmp(end_of_launch) != 0) return false;
#endif
    while (take_turns(count)) {
    }
    while (!on_their_way.empty()) deliver();
    check_finished(count);
    return true;
}

bool is_alive(unsigned block) { return alive[block] > 0; }

void barrier(unsigned name, unsigned count) {
    arrive_at_barrier(name, count);
    fibres[running]->barrier = name;
    wait(State::at_barrier);
}

void arrive_at_barrier(unsigned name, unsigned count) {
    if (name >= BARRIERS) fail("a block has no barrier %u", name);
    if (count % WARP != 0) fail("a barrier of %u threads: not whole warps", count);
    Barrier& barrier = barriers[current->rank][name];
    if (barrier.arrived > 0 && barrier.expected != count) {
        fail("threads arrive at barrier %u for %u and for %u threads", name, barrier.expected, count);
    }
    barrier.expected = count;
    ++barrier.arrived;
}

void cluster_arrive() {
    Fibre& fibre = *fibres[running];
    if (fibre.has_arrived) fail("a thread arrives twice at the cluster's barrier");
    fibre.has_arrived = true;
    fibre.generation = cluster_generation;
    ++cluster_arrived;
}

void cluster_wait() {
    Fibre& fibre = *fibres[running];
    if (!fibre.has_arrived) fail("a thread waits at the cluster's barrier without having arrived");
    if (fibre.generation == cluster_generation) wait(State::at_cluster_barrier);
    fibre.has_arrived = false;
}

void later(std::function<void()> copy) {
    if (schedule == 0) return copy();
    on_their_way.push_back(std::move(copy));
}

void step_aside() { wait(State::ready); }

void start_arrivals(uint64_t* arrivals, unsigned count) { *arrivals = MbarrierState::start(count); }
void arrive(uint64_t* arrivals, unsigned count, int expected_bytes) { change(arrivals, count, expected_bytes); }
void complete(uint64_t* arrivals, int bytes) { change(arrivals, 0, -bytes); }
unsigned phase_of(const uint64_t* arrivals) { return MbarrierState(*arrivals).phase; }
bool is_complete(const uint64_t* arrivals, unsigned phase) { return phase_of(arrivals) != phase; }
void await(uint64_t* arrivals, unsigned phase) {
    if (!MbarrierState(*arrivals).is_started) fail("an mbarrier is awaited before it is initialised");
    if (is_complete(arrivals, phase)) return;
    fibres[running]->arrivals = arrivals;
    fibres[running]->phase = phase;
    wait(State::at_arrivals);
}

const unsigned char* exchange(const void* mine, unsigned bytes, unsigned mask) {
    if (!(mask >> current->linear % WARP & 1)) fail("a lane exchanges with a mask that lacks it");
    const unsigned thread = running;
    std::memcpy(given_by(thread), mine, bytes);
    fibres[thread]->mask = mask;
    wait(State::at_warp_barrier);
    return exchanged_by(thread / WARP * WARP);
}

}  // namespace host_cuda
