// Camera counts to the network's range and back, on the GPU. The rule is engine/scaling.py's, and so
// is every bit of the result: products and sums are rounded one by one (no fused multiply-add), and
// rounding to counts is to the nearest even.
//
// A captured graph freezes the arguments of its kernels, so what changes from plane to plane, the
// scaling, lies in device memory: Params is uploaded with the plane.
//
// There is no shared memory and no talk between threads, and an atomic is used only where it changes
// a value. The same source therefore compiles for the host, where tests hold it against numpy.
//
// convert.ptx beside this file is made from it by `python -m tests.make_ptx`.

struct Params {
    float offset;   // counts
    float scale;    // counts
    float inverse;  // 1 / scale, computed in float64 as engine/scaling.py does
};

struct Stats {
    unsigned int clipped;    // pixels that did not fit into the counts and were cut to their limit
    unsigned int nonfinite;  // values of the network's answer that are NaN or infinite
    int lowest;              // of the finite values of the answer, in the order of `ordered`
    int highest;
};

__device__ __forceinline__ bool is_finite(float value) {
    return (__float_as_int(value) & 0x7f800000) != 0x7f800000;
}

// An int that sorts as its float does: atomics compare ints.
__device__ __forceinline__ int ordered(float value) {
    const int bits = __float_as_int(value);
    return bits >= 0 ? bits : bits ^ 0x7fffffff;
}

// Where np.pad(mode="reflect") takes the pixel *index* of a side of *size* pixels from.
__device__ __forceinline__ int reflected(int index, int size) {
    if (index < size) return index;
    if (size == 1) return 0;
    index %= 2 * (size - 1);
    return index < size ? index : 2 * (size - 1) - index;
}

template <typename Raw>
__device__ __forceinline__ void to_network(const Raw* raw, float* network, int height, int width,
                                           int padded_height, int padded_width,
                                           const Params* params) {
    const float offset = params->offset, inverse = params->inverse;
    for (int y = blockIdx.y; y < padded_height; y += gridDim.y) {
        const Raw* from = raw + (size_t)reflected(y, height) * width;
        float* to = network + (size_t)y * padded_width;
        for (int x = blockIdx.x * blockDim.x + threadIdx.x; x < padded_width;
             x += gridDim.x * blockDim.x)
            to[x] = __fmul_rn(__fsub_rn((float)from[reflected(x, width)], offset), inverse);
    }
}

template <typename Raw>
__device__ __forceinline__ void to_counts(const float* network, Raw* counts, int height, int width,
                                          int padded_width, const Params* params, Stats* stats) {
    const float offset = params->offset, scale = params->scale, limit = (Raw)-1;
    unsigned int clipped = 0, nonfinite = 0;
    int lowest = 0x7fffffff, highest = -lowest - 1;
    for (int y = blockIdx.y; y < height; y += gridDim.y) {
        const float* from = network + (size_t)y * padded_width;
        Raw* to = counts + (size_t)y * width;
        for (int x = blockIdx.x * blockDim.x + threadIdx.x; x < width; x += gridDim.x * blockDim.x) {
            const float value = from[x];
            if (is_finite(value)) {
                lowest = min(lowest, ordered(value));
                highest = max(highest, ordered(value));
            } else {
                nonfinite += 1;
            }
            const float level = rintf(__fadd_rn(__fmul_rn(value, scale), offset));
            clipped += level < 0.0f || level > limit;
            to[x] = (Raw)fminf(fmaxf(level, 0.0f), limit);  // NaN becomes 0
        }
    }
    if (clipped) atomicAdd(&stats->clipped, clipped);
    if (nonfinite) atomicAdd(&stats->nonfinite, nonfinite);
    if (lowest < *(volatile int*)&stats->lowest) atomicMin(&stats->lowest, lowest);
    if (highest > *(volatile int*)&stats->highest) atomicMax(&stats->highest, highest);
}

extern "C" __global__ void to_network_u8(const unsigned char* raw, float* network, int height,
                                         int width, int padded_height, int padded_width,
                                         const Params* params) {
    to_network(raw, network, height, width, padded_height, padded_width, params);
}

extern "C" __global__ void to_network_u16(const unsigned short* raw, float* network, int height,
                                          int width, int padded_height, int padded_width,
                                          const Params* params) {
    to_network(raw, network, height, width, padded_height, padded_width, params);
}

extern "C" __global__ void reset_stats(Stats* stats) {
    stats->clipped = stats->nonfinite = 0;
    stats->lowest = 0x7fffffff;
    stats->highest = -0x7fffffff - 1;
}

extern "C" __global__ void to_counts_u8(const float* network, unsigned char* counts, int height,
                                        int width, int padded_width, const Params* params,
                                        Stats* stats) {
    to_counts(network, counts, height, width, padded_width, params, stats);
}

extern "C" __global__ void to_counts_u16(const float* network, unsigned short* counts, int height,
                                         int width, int padded_width, const Params* params,
                                         Stats* stats) {
    to_counts(network, counts, height, width, padded_width, params, stats);
}
