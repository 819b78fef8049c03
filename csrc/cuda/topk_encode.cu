#include <algorithm>

#include "cuda/topk_encode.h"
#include "cuda/topk_encode_epilogue.cuh"

namespace microtome::cuda {
namespace {

using namespace encode;

// Counted in 32 bits, also the tile after a block's last.
constexpr int64_t kMost = (int64_t{1} << 31) - 1 - (1 << 16);

int64_t tiles_of(int64_t extent, int64_t tile) { return (extent + tile - 1) / tile; }

int multiprocessors() {
#if defined(__CUDACC__)
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return std::max(count, 1);
#else
    return 2;  // so that tests see blocks take several tiles
#endif
}

struct Matrix {
    uintptr_t address;
    int64_t rows, stride;
};

template <class Epilogue>
void run(const char* name, const Matrix& x, const Matrix& w, int64_t d, const Epilogue& epilogue, uintptr_t stream) {
    const int64_t row_tiles = tiles_of(x.rows, kRows), feature_tiles = tiles_of(w.rows, kFeatures);
    if (row_tiles == 0 || feature_tiles == 0) return;
    if (row_tiles * feature_tiles > kMost || x.rows > kMost || w.rows > kMost || d > kMost) {
        throw std::runtime_error(std::string(name) + ": too many rows or features for one launch");
    }
    const Work work{static_cast<int>(x.rows), static_cast<int>(w.rows), static_cast<int>(tiles_of(d, kDepth)),
                    static_cast<int>(row_tiles), static_cast<int>(feature_tiles)};
    // First: cuTensorMapEncodeTiled fails where no context is current, as in a thread of autograd's that is new to
    // CUDA.
    allow_shared(name, encode_kernel<Epilogue>, sizeof(Shared));
    const auto map = [&](const Matrix& m, uint32_t box_rows) {
        return hopper::tensor_map(name, m.address, static_cast<uint64_t>(m.rows), static_cast<uint64_t>(d),
                                  static_cast<uint64_t>(m.stride) * 2, box_rows);
    };
    const Geometry geometry{dim3(static_cast<unsigned>(std::min(work.tiles(), multiprocessors()))), dim3(kThreads),
                            sizeof(Shared), stream};
    launch(name, encode_kernel<Epilogue>, geometry, map(x, kRows), map(w, kFeatures), work, epilogue);
}

}  // namespace

void topk_encode_filter(uintptr_t x, int64_t x_stride, uintptr_t x_stats, uintptr_t w, int64_t w_stride,
                        uintptr_t w_stats, uintptr_t b_enc, uintptr_t theta, uintptr_t count, uintptr_t index,
                        int64_t rows, int64_t f, int64_t d, int64_t capacity, uintptr_t stream) {
    if (capacity > kMost) throw std::runtime_error("topk_encode_filter: too large a capacity");
    const Filter filter{reinterpret_cast<const float4*>(x_stats),
                        reinterpret_cast<const float4*>(w_stats),
                        reinterpret_cast<const float*>(b_enc),
                        reinterpret_cast<const float*>(theta),
                        reinterpret_cast<int*>(count),
                        reinterpret_cast<int*>(index),
                        static_cast<int>(capacity),
                        static_cast<float>(d) * 0x1p-24f};
    run("topk_encode_filter", {x, rows, x_stride}, {w, f, w_stride}, d, filter, stream);
}

void topk_encode_sample(uintptr_t x, int64_t x_stride, uintptr_t w, int64_t w_stride, uintptr_t b_enc, uintptr_t maxima,
                        int64_t rows, int64_t f, int64_t d, int64_t stride, int64_t group, uintptr_t stream) {
    const Matrix sampled{w, tiles_of(f, stride), w_stride * stride};
    const int64_t groups = tiles_of(sampled.rows, kFeatures) * (kFeatures / group);
    const auto sample = [&](auto epilogue) {
        run("topk_encode_sample", {x, rows, x_stride}, sampled, d, epilogue, stream);
    };
    const auto* bias = reinterpret_cast<const float*>(b_enc);
    auto* to = reinterpret_cast<float*>(maxima);
    if (group == 1) return sample(Maxima<1>{bias, stride, to, groups});
    if (group == 4) return sample(Maxima<4>{bias, stride, to, groups});
    if (group == 16) return sample(Maxima<16>{bias, stride, to, groups});
    throw std::runtime_error("topk_encode_sample: group must be 1, 4 or 16, got " + std::to_string(group));
}

}  // namespace microtome::cuda
