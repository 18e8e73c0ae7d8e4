// Replays recorded launches with every buffer in its own allocation, for AddressSanitizer and ThreadSanitizer.
//   job INPUT OUTPUT
// INPUT: number of buffers, each as address, length, bytes; number of pointers at the start of a problem; number of
// launches, each as name (64 bytes), grid, block (6 x 32 bits), shared bytes, length of the problem, problem.
// All counts have 64 bits. OUTPUT: the bytes of the buffers afterwards.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <vector>

extern "C" int launch_forward(const char*, const unsigned*, const unsigned*, size_t, const void*);
extern "C" int launch_backward(const char*, const unsigned*, const unsigned*, size_t, const void*);
extern "C" int launch_finish(const char*, const unsigned*, const unsigned*, size_t, const void*);

struct Buffer {
    uint64_t address = 0, length = 0;
    unsigned char* copy = nullptr;
};

template <typename T>
T take(std::ifstream& file) {
    T value;
    file.read(reinterpret_cast<char*>(&value), sizeof(T));
    return value;
}

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    std::ifstream input(argv[1], std::ios::binary);
    std::vector<Buffer> buffers(take<uint64_t>(input));
    for (Buffer& buffer : buffers) {
        buffer.address = take<uint64_t>(input);
        buffer.length = take<uint64_t>(input);
        buffer.copy = static_cast<unsigned char*>(std::malloc(buffer.length));
        input.read(reinterpret_cast<char*>(buffer.copy), static_cast<std::streamsize>(buffer.length));
    }
    const uint64_t pointers = take<uint64_t>(input), launches = take<uint64_t>(input);
    for (uint64_t i = 0; i < launches; ++i) {
        char name[64];
        input.read(name, sizeof(name));
        unsigned sizes[6];
        input.read(reinterpret_cast<char*>(sizes), sizeof(sizes));
        const uint64_t shared_bytes = take<uint64_t>(input);
        std::vector<uint64_t> problem(take<uint64_t>(input) / 8);
        input.read(reinterpret_cast<char*>(problem.data()), static_cast<std::streamsize>(problem.size() * 8));
        for (uint64_t j = 0; j < pointers; ++j) {
            for (const Buffer& buffer : buffers) {
                if (problem[j] >= buffer.address && problem[j] < buffer.address + buffer.length) {
                    problem[j] = reinterpret_cast<uint64_t>(buffer.copy) + (problem[j] - buffer.address);
                    break;
                }
            }
        }
        if (launch_forward(name, sizes, sizes + 3, shared_bytes, problem.data()) != 0 &&
            launch_backward(name, sizes, sizes + 3, shared_bytes, problem.data()) != 0 &&
            launch_finish(name, sizes, sizes + 3, shared_bytes, problem.data()) != 0) {
            std::fprintf(stderr, "no kernel %s\n", name);
            return 2;
        }
    }
    std::ofstream output(argv[2], std::ios::binary);
    for (const Buffer& buffer : buffers) {
        output.write(reinterpret_cast<const char*>(buffer.copy), static_cast<std::streamsize>(buffer.length));
        std::free(buffer.copy);
    }
    return 0;
}
