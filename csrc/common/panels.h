// Rows times weights that lie in panels of 32 outputs: what packed_linear and delta_linear have in common. Here the
// problem and how it is cut for threads; the loops of an instruction set are in panel_kernel.h.
#pragma once

#include <cstdint>

namespace microtome {

constexpr int64_t kPanelLanes = 32;

// y [T, o] = (x - x_base[index]) W^T + y_base[index] + bias + add, where every term but x may be absent (null).
// Strides are in elements and between rows; within a row elements are neighbours. y is contiguous.
struct PanelProduct {
    int64_t T, i, o;
    const float* x;
    int64_t x_stride;
    const float* x_base;
    int64_t x_base_stride;
    const int32_t* index;
    const void* packed;
    const float* bias;
    const float* y_base;
    int64_t y_base_stride;
    const float* add;
    int64_t add_stride;
    float* y;
};

// One level's loops. `run` answers rows [r0, r1) and panels [p0, p1); rows are packed a block at a time into
// `scratch`, which has room for `block` rows of row_bytes(i) and kPanelSlack more.
struct PanelKernels {
    int64_t rows;     // rows that a tile takes together, at most
    int64_t granule;  // tiles take no fewer: work is cut at multiples
    int64_t (*row_bytes)(int64_t i);
    void (*run)(const PanelProduct& p, int64_t r0, int64_t r1, int64_t p0, int64_t p1, int64_t block, char* scratch);
};

constexpr int64_t kPanelSlack = 2048;  // bytes: a tile that is not full reads on to its last row

namespace {

// The first row of part j when n rows are cut into parts, as evenly as granules allow. Each file has its own: see
// simd.h.
inline int64_t part_start(int64_t n, int64_t j, int64_t parts, int64_t granule) {
    const int64_t start = (n + granule - 1) / granule * j / parts * granule;
    return start < n ? start : n;
}

}  // namespace

// Whole product. The answer does not depend on `threads`: each sum is computed in one place and one order.
void run_panels(const PanelProduct& p, const PanelKernels& kernels, int threads);

}  // namespace microtome
