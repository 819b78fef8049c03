// The way into a network: walks through its first layer, and rows of activations in the order of the next product.
//
// The rows of a sliver are neighbours of a walk. While it takes its steps, the first layer's sums of a few panels stay
// in registers: a step adds one row of `gains` and writes the activations where the next product wants them.
#pragma once

#include "common/activations.h"
#include "common/panel_listed.h"
#include "cpu/mlp_shapley.h"
#include "cpu/packed_linear_kernel.h"

namespace microtome::cpu {
namespace {

constexpr int64_t kTile = 4;      // slivers that pass a panel while it is in the first-level cache
constexpr int64_t kMostDots = 4;  // outputs; more of them are computed from stored rows
#if defined(__AVX512F__)
constexpr int kGroups = 4;  // panels of sums that a walk keeps in registers
#else
constexpr int kGroups = 1;
#endif

inline int64_t panels_of(int64_t width) { return (width + kPanelLanes - 1) / kPanelLanes; }
inline int64_t padded(int64_t width) { return panels_of(width) * kPanelLanes; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

alignas(64) constexpr float kNoBias[kPanelLanes] = {};

// Where rows go, a line at a time: lines + r * row + c * line, in bytes. seen [lines], where it is wanted, gets a bit
// for each entry of four bytes that is not zero in every row.
struct Sink {
    char* lines;
    int64_t row, line;
    uint16_t* seen;
};

struct Scratch {
    float *start, *gains, *state, *rows, *sums;
    char* lines[2];
    uint16_t* seen[2];
    int32_t* list;
};

// The buffers of a thread one after another from `memory` on; returns their end. widest: outputs of a layer.
template <class Level>
char* divide(const Mlp& mlp, char* memory, Scratch& s) {
    const auto take = [&memory](int64_t bytes) {
        char* at = memory;
        memory += (bytes + kLine - 1) / kLine * kLine;
        return at;
    };
    const auto floats = [&take](int64_t count) { return reinterpret_cast<float*>(take(count * 4)); };
    const int64_t first = padded(mlp.first_outputs), rows = kTile * Level::kRows;
    int64_t widest = first;
    for (int64_t l = 0; l < mlp.middles; ++l) widest = larger(widest, padded(mlp.middle[l].outputs));
    s.start = floats(first);
    s.gains = floats(first * (mlp.p + 1));
    s.state = floats(first);
    s.rows = floats(rows * larger(larger(first, padded(mlp.last_inputs)), kMostDots * 16));
    s.sums = floats(Level::kRows * kPanelLanes);
    for (int j = 0; j < 2; ++j) {
        s.lines[j] = take(rows * Level::row_bytes(widest) + kPanelSlack);
        s.seen[j] = reinterpret_cast<uint16_t*>(take(kTile * (widest / 16) * 2));
    }
    s.list = reinterpret_cast<int32_t*>(take(kTile * (widest + 16) * 4));
    return memory;
}

// One line of one row. The compiler keeps `values` in registers.
template <int code, class Format>
inline void put(const vf* h, char* line, vf (&seen)[kParts]) {
    alignas(64) float values[Format::line_columns];
    for (int v = 0; v < Format::line_columns / kWidth; ++v) store(values + v * kWidth, activate<code>(h[v]));
    Format::pack(line, values, nullptr, Format::line_columns);
    const float* entries = reinterpret_cast<const float*>(line);
    for (int part = 0; part < kParts; ++part) seen[part] = either(seen[part], load(entries + part * kWidth));
}

// Panels [panel, panel + G) of the first layer in `count` steps of a walk.
template <int code, class Format, int G>
inline void walk_panels(const Mlp& mlp, const Scratch& s, const WalkStep* steps, int64_t count, int64_t panel,
                        Sink to) {
    constexpr int kVectors = kPanelLanes / kWidth, kLines = G * kPanelLanes / Format::line_columns;
    const float* start = s.start + panel * kPanelLanes;
    const float* gains = s.gains + panel * (mlp.p + 1) * kPanelLanes;
    float* state = s.state + panel * kPanelLanes;
    const int64_t first_line = panel * kPanelLanes / Format::line_columns;
    vf h[G * kVectors], seen[kLines][kParts];
    for (int v = 0; v < G * kVectors; ++v) h[v] = load(state + v * kWidth);
    for (int l = 0; l < kLines; ++l) {
        for (int part = 0; part < kParts; ++part) seen[l][part] = zero();
    }
    char* row = to.lines + first_line * to.line;
    for (int64_t r = 0; r < count; ++r, row += to.row) {
        if (steps[r].anew) {
            for (int v = 0; v < G * kVectors; ++v) h[v] = load(start + v * kWidth);
        }
        const float* gain = gains + steps[r].player * kPanelLanes;
        for (int g = 0; g < G; ++g, gain += (mlp.p + 1) * kPanelLanes) {
            for (int v = 0; v < kVectors; ++v) h[g * kVectors + v] = add(h[g * kVectors + v], load(gain + v * kWidth));
        }
        for (int l = 0; l < kLines; ++l) {
            put<code, Format>(h + l * (Format::line_columns / kWidth), row + l * to.line, seen[l]);
        }
    }
    for (int v = 0; v < G * kVectors; ++v) store(state + v * kWidth, h[v]);
    if (!to.seen) return;
    for (int l = 0; l < kLines; ++l) to.seen[first_line + l] = static_cast<uint16_t>(nonzero(seen[l]));
}

template <int code, class Format, int G = kGroups>
void walk(const Mlp& mlp, const Scratch& s, const WalkStep* steps, int64_t count, int64_t panel, Sink to) {
    const int64_t end = panels_of(mlp.first_outputs);
    for (; panel + G <= end; panel += G) walk_panels<code, Format, G>(mlp, s, steps, count, panel, to);
    if constexpr (G > 1) walk<code, Format, G / 2>(mlp, s, steps, count, panel, to);
}

// start and gains of panels from `panel` on, G at a time.
template <int G>
void prepare_panels(const Mlp& mlp, const float* x, const float* b, const Scratch& s, int64_t panel) {
    constexpr int kVectors = kPanelLanes / kWidth;
    const int64_t stride = mlp.m * kPanelLanes, step = (mlp.p + 1) * kPanelLanes;
    for (; panel + G <= panels_of(mlp.first_outputs); panel += G) {
        const float* W = mlp.first + panel * stride;
        float* gain = s.gains + panel * step;
        vf h[G][kVectors], sum[G][kVectors];
        for (int g = 0; g < G; ++g) {
            for (int v = 0; v < kVectors; ++v) h[g][v] = load(mlp.first_bias + (panel + g) * kPanelLanes + v * kWidth);
        }
        for (int64_t j = -1; j < mlp.p; ++j) {
            for (int g = 0; g < G; ++g) {
                for (int v = 0; v < kVectors; ++v) sum[g][v] = zero();
            }
            for (int64_t k = mlp.begin[j + 1]; k < mlp.begin[j + 2]; ++k) {
                const int64_t c = mlp.column[k];
                const vf before = set1(j < 0 ? x[c] : b[c]), change = set1(x[c] - b[c]);
                for (int g = 0; g < G; ++g) {
                    for (int v = 0; v < kVectors; ++v) {
                        const vf w = load(W + g * stride + c * kPanelLanes + v * kWidth);
                        h[g][v] = fma(before, w, h[g][v]);
                        sum[g][v] = fma(change, w, sum[g][v]);
                    }
                }
            }
            for (int g = 0; g < G && j >= 0; ++g) {
                for (int v = 0; v < kVectors; ++v) store(gain + g * step + j * kPanelLanes + v * kWidth, sum[g][v]);
            }
        }
        for (int g = 0; g < G; ++g) {
            for (int v = 0; v < kVectors; ++v) {
                store(gain + g * step + mlp.p * kPanelLanes + v * kWidth, zero());
                store(s.start + (panel + g) * kPanelLanes + v * kWidth, h[g][v]);
            }
        }
    }
    if constexpr (G > 1) prepare_panels<G / 2>(mlp, x, b, s, panel);
}

// Rows of `to`, columns of one panel: the activation of rows [count, stride] + bias [32].
template <int code, class Format>
void emit(const float* rows, int64_t stride, const float* bias, int64_t count, int64_t panel, Sink to) {
    constexpr int kVectors = kPanelLanes / kWidth, kLines = kPanelLanes / Format::line_columns;
    const int64_t first_line = panel * kLines;
    vf b[kVectors], seen[kLines][kParts];
    for (int v = 0; v < kVectors; ++v) b[v] = load(bias + v * kWidth);
    for (int l = 0; l < kLines; ++l) {
        for (int part = 0; part < kParts; ++part) seen[l][part] = zero();
    }
    char* row = to.lines + first_line * to.line;
    for (int64_t r = 0; r < count; ++r, rows += stride, row += to.row) {
        vf h[kVectors];
        for (int v = 0; v < kVectors; ++v) h[v] = add(load(rows + v * kWidth), b[v]);
        for (int l = 0; l < kLines; ++l) {
            put<code, Format>(h + l * (Format::line_columns / kWidth), row + l * to.line, seen[l]);
        }
    }
    if (!to.seen) return;
    for (int l = 0; l < kLines; ++l) to.seen[first_line + l] = static_cast<uint16_t>(nonzero(seen[l]));
}

// The same for any activation. Others than light ones are computed in `rows`, which lie together.
template <class Format>
inline void finish_rows(int code, float* rows, const float* bias, int64_t count, int64_t panel, const Sink& to) {
    if (code == kRelu) return emit<kRelu, Format>(rows, kPanelLanes, bias, count, panel, to);
    if (code == kIdentity) return emit<kIdentity, Format>(rows, kPanelLanes, bias, count, panel, to);
    activate_any(code, rows, bias, count * kPanelLanes);
    emit<kIdentity, Format>(rows, kPanelLanes, kNoBias, count, panel, to);
}

// Plain rows, a line of sixteen floats after another.
inline Sink plain_rows(float* rows, int64_t width) {
    return {reinterpret_cast<char*>(rows), width * 4, kLine, nullptr};
}

// The first layer of a sliver: into `to`, or where `to` is plain rows, or for a lack of registers, through plain rows.
template <class Format>
void first_layer(const Mlp& mlp, const Scratch& s, const WalkStep* steps, int64_t count, float* rows, const Sink& to) {
    if (mlp.first_activation == kRelu) return walk<kRelu, Format>(mlp, s, steps, count, 0, to);
    const int64_t width = padded(mlp.first_outputs);
    walk<kIdentity, Float32>(mlp, s, steps, count, 0, plain_rows(rows, width));
    if (mlp.first_activation != kIdentity) activate_any(mlp.first_activation, rows, kNoBias, count * width);
    if (reinterpret_cast<char*>(rows) == to.lines) return;
    for (int64_t panel = 0; panel < width / kPanelLanes; ++panel) {
        emit<kIdentity, Format>(rows + panel * kPanelLanes, width, kNoBias, count, panel, to);
    }
}

}  // namespace
}  // namespace microtome::cpu
