// convert.cu, compiled for the host, one thread of the GPU after the other.
#pragma once
#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>

#include "device.h"

struct Index {
    int x = 0, y = 0;
};
static Index blockIdx, threadIdx, gridDim, blockDim;

#define __global__
#define __device__
#define __forceinline__ inline
static inline int __float_as_int(float value) {
    int bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline void atomicAdd(unsigned int* to, unsigned int value) { *to += value; }
static inline void atomicMin(int* to, int value) { *to = std::min(*to, value); }
static inline void atomicMax(int* to, int value) { *to = std::max(*to, value); }
using std::max;
using std::min;
#include "convert.cu"

struct Arguments {  // as a launch gives them: a pointer each, or packed into one buffer
    void** pointers;
    const char* packed;
    size_t packed_size, offset = 0, number = 0;

    template <typename T>
    void take(T& value) {
        if (pointers) {
            memcpy(&value, pointers[number++], sizeof(T));
            return;
        }
        offset = (offset + alignof(T) - 1) / alignof(T) * alignof(T);
        if (offset + sizeof(T) <= packed_size) memcpy(&value, packed + offset, sizeof(T));
        offset += sizeof(T);
    }
};

template <typename T>
bool reachable(T value) {
    if constexpr (std::is_pointer_v<T>)
        return machine.device.holds(reinterpret_cast<uintptr_t>(value), 1);
    else
        return true;
}

// A launch with its arguments as they are now; an empty function where they do not fit.
template <typename... A>
Op frozen(void (*kernel)(A...), Index grid, Index block, Arguments given) {
    std::tuple<A...> values;
    std::apply([&](auto&... value) { (given.take(value), ...); }, values);
    if (!given.pointers && given.offset != given.packed_size) return {};
    return [=] {
        if (!std::apply([](auto... value) { return (reachable(value) && ...); }, values))
            return ILLEGAL_ADDRESS;
        gridDim = grid, blockDim = block;
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++)
                for (threadIdx.x = 0; threadIdx.x < block.x; threadIdx.x++)
                    std::apply(kernel, values);
        return OK;
    };
}

using Launch = std::function<Op(Index, Index, Arguments)>;
#define KERNEL(name) {#name, [](Index g, Index b, Arguments a) { return frozen(name, g, b, a); }}
inline std::map<std::string, Launch> kernels = {
    KERNEL(to_network_u8), KERNEL(to_network_u16), KERNEL(to_counts_u8),
    KERNEL(to_counts_u16), KERNEL(reset_stats),
};
