#include "cpu/pack_weights.h"

#include <algorithm>
#include <cstring>

#include "common/panels.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace microtome::cpu {
namespace {

constexpr int64_t kColumns = 32;  // of W, taken at once: two cache lines of each row, and whole pairs

struct Matrix {
    const float* data;
    int64_t rows, columns, row_stride, column_stride;
};

// block [kColumns][32] = W[row .. , column ..] transposed, zero beyond W's ends.
void transpose(const Matrix& W, int64_t row, int64_t column, float (&block)[kColumns][kPanelLanes]) {
    const int64_t rows = std::min(W.rows - row, kPanelLanes), columns = std::min(W.columns - column, kColumns);
    if (rows < kPanelLanes || columns < kColumns) std::memset(block, 0, sizeof block);
    const float* from = W.data + row * W.row_stride + column * W.column_stride;
    for (int64_t c = 0; c < columns; ++c) {
        for (int64_t j = 0; j < rows; ++j) block[c][j] = from[j * W.row_stride + c * W.column_stride];
    }
}

void pack_panel(const Matrix& W, int64_t panel, float* out) {
    float block[kColumns][kPanelLanes];
    for (int64_t c = 0; c < W.columns; c += kColumns) {
        transpose(W, panel * kPanelLanes, c, block);
        const int64_t columns = std::min(W.columns - c, kColumns);
        std::memcpy(out + c * kPanelLanes, block, static_cast<size_t>(columns * kPanelLanes) * sizeof(float));
    }
}

void pack_panel(const Matrix& W, int64_t panel, bf16* out) {
    float block[kColumns][kPanelLanes];
    for (int64_t c = 0; c < W.columns; c += kColumns) {
        transpose(W, panel * kPanelLanes, c, block);
        for (int64_t q = 0; q < kColumns; q += 2) {
            for (int64_t j = 0; j < kPanelLanes; ++j, out += 2) {
                narrow(block[q][j], out);
                narrow(block[q + 1][j], out + 1);
            }
        }
    }
}

}  // namespace

void pack_weights(uintptr_t W, int64_t o, int64_t i, int64_t row_stride, int64_t column_stride, bool half,
                  uintptr_t out, int threads) {
    const Matrix matrix{reinterpret_cast<const float*>(W), o, i, row_stride, column_stride};
    const int64_t panels = (o + kPanelLanes - 1) / kPanelLanes;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
        if (half) {
            pack_panel(matrix, p, reinterpret_cast<bf16*>(out) + p * ((i + 31) / 32 * 32) * kPanelLanes);
        } else {
            pack_panel(matrix, p, reinterpret_cast<float*>(out) + p * i * kPanelLanes);
        }
    }
}

}  // namespace microtome::cpu
