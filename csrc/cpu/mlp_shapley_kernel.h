// The loops of mlp_shapley, compiled once per instruction set; simd.h has the rules of such files.
//
// The rows of a sliver are neighbours of a walk. While it takes its steps, the first layer's sums of a few panels stay
// in registers: a step adds one row of `gains` and writes the activations where the next product wants them. Slivers
// pass from layer to layer as in panel_kernel.h. After a ReLU, entries that are zero in all rows of a sliver are left
// out of the product: as its rows are neighbours, these are nearly as many as in a single row.
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

// The last product begins where the sums of the one before end: out [rows][o][16] gathers, lane by lane, the products
// of ReLU(sums + bias) with the rows of `last` [o, stride], in the order of simd.h's `dot`.
struct ReluDots {
    const float *bias, *last;
    int64_t stride, o;
    float* out;
    int64_t column;
    ReluDots at(int64_t from) const { return {bias, last, stride, o, out, column + from}; }
    void operator()(int r, vf left, vf right) const {
        const vf a = max(zero(), add(left, load(bias + column))),
                 b = max(zero(), add(right, load(bias + column + kWidth)));
        float* to = out + r * o * 16;
        const float* w = last + column;
        for (int64_t j = 0; j < o; ++j, to += 16, w += stride) {
            if constexpr (kParts == 1) {
                store(to, fma(b, load(w + kWidth), fma(a, load(w), load(to))));
            } else {
                float *one = to + column % 16, *other = to + (column + kWidth) % 16;
                store(one, fma(a, load(w), load(one)));
                store(other, fma(b, load(w + kWidth), load(other)));
            }
        }
    }
};

// values [count, o] from the sums that ReluDots left.
inline void fold_dots(const Mlp& mlp, const float* out, int64_t count, float* values) {
    for (int64_t r = 0; r < count; ++r, values += mlp.o) {
        for (int64_t j = 0; j < mlp.o; ++j, out += 16) {
            vf lanes[kParts];
            for (int part = 0; part < kParts; ++part) lanes[part] = load(out + part * kWidth);
            values[j] = fold(lanes) + mlp.last_bias[j];
        }
    }
}

// values [count, o] = the last layer of rows [count, inputs].
inline void last_layer(const Mlp& mlp, const float* rows, int64_t count, float* values) {
    const int64_t width = padded(mlp.last ? mlp.last_inputs : mlp.o);
    for (int64_t r = 0; r < count; ++r, rows += width) {
        for (int64_t j = 0; j < mlp.o; ++j) {
            values[r * mlp.o + j] = mlp.last ? dot(rows, mlp.last + j * width, width) + mlp.last_bias[j] : rows[j];
        }
    }
}

// Panel: how an entry meets the weights where entries may be left out, void where the level cannot.
template <class Level, class Panel>
struct MlpLevel {
    static int64_t scratch_bytes(const Mlp& mlp) {
        Scratch s;
        char* const from = reinterpret_cast<char*>(kLine);  // any address: nothing is read or written
        return divide<Level>(mlp, from, s) - from;
    }

    static void prepare(const Mlp& mlp, const float* x, const float* b, char* memory) {
        Scratch s;
        divide<Level>(mlp, memory, s);
        prepare_panels<kGroups>(mlp, x, b, s, 0);
    }

    static void evaluate(const Mlp& mlp, const WalkStep* steps, int64_t count, char* memory, float* values) {
        Scratch s;
        divide<Level>(mlp, memory, s);
        const int64_t width = mlp.last ? padded(mlp.last_inputs) : padded(mlp.o);
        const bool lists = kLists && mlp.middles && mlp.middle[0].skips;
        for (int64_t from = 0; from < count;) {
            int64_t at[kTile + 1] = {}, slivers = 0;  // sliver v has the tile's rows at[v] .. at[v + 1] - 1
            for (; slivers < kTile && from + at[slivers] < count; ++slivers) {
                const int64_t row = from + at[slivers];
                at[slivers + 1] = at[slivers] + next_sliver(steps + row, count - row, lists);
            }
            for (int64_t v = 0; v < slivers; ++v) {
                const WalkStep* first = steps + from + at[v];
                if (mlp.middles) {
                    first_layer<Level>(mlp, s, first, at[v + 1] - at[v], s.rows, sink(mlp, s, 0, v, at));
                } else {
                    float* plain = s.rows + at[v] * width;
                    first_layer<Float32>(mlp, s, first, at[v + 1] - at[v], plain, plain_rows(plain, width));
                }
            }
            for (int64_t l = 0; l < mlp.middles; ++l) middle_layer(mlp, s, l, at, slivers);
            if (has_dots(mlp)) {
                fold_dots(mlp, s.rows, at[slivers], values + from * mlp.o);
            } else {
                last_layer(mlp, s.rows, at[slivers], values + from * mlp.o);
            }
            from += at[slivers];
        }
        if (mlp.last) activate_any(mlp.last_activation, values, kNoBias, count * mlp.o);
    }

  private:
    static constexpr bool kLists = Panel::kEntries == 1;

    static bool has_dots(const Mlp& mlp) {
        return kLists && mlp.middles && mlp.o <= kMostDots && mlp.middle[mlp.middles - 1].activation == kRelu;
    }

    // How many of the `left` steps make the next sliver: parts as even as granules allow of all of them or, where
    // entries are listed, of one walk, since a jump between two walks leaves fewer entries zero.
    static int64_t next_sliver(const WalkStep* steps, int64_t left, bool lists) {
        const int64_t reach = lists && steps->left >= Level::kRows / 2 ? steps->left : left;
        const int64_t parts = (reach + Level::kRows - 1) / Level::kRows;
        return part_start(reach, 1, parts, Level::kGranule);
    }

    // Where sliver v of a tile stands as the input of middle layer l.
    static Sink sink(const Mlp& mlp, const Scratch& s, int64_t l, int64_t v, const int64_t* at) {
        const MiddleLayer& layer = mlp.middle[l];
        uint16_t* seen = s.seen[l % 2] + v * (padded(layer.inputs) / 16);
        return {s.lines[l % 2] + at[v] * Level::row_bytes(padded(layer.inputs)), kLine, (at[v + 1] - at[v]) * kLine,
                kLists && layer.skips ? seen : nullptr};
    }

    static void middle_layer(const Mlp& mlp, const Scratch& s, int64_t l, const int64_t* at, int64_t slivers) {
        const MiddleLayer& layer = mlp.middle[l];
        const bool last = l + 1 == mlp.middles, dots = last && has_dots(mlp);
        const int64_t inputs = padded(layer.inputs), outputs = padded(layer.outputs), stride = inputs + 16;
        int64_t counts[kTile];
        for (int64_t v = 0; v < slivers && kLists; ++v) {
            int32_t* list = s.list + v * stride;
            if (layer.skips) {
                counts[v] = list_bits(s.seen[l % 2] + v * (inputs / 16), Level::row_bytes(inputs) / kLine, list);
            } else {
                counts[v] = Level::panel_bytes(layer.inputs) / kStep;
                for (int64_t k = 0; k < counts[v]; ++k) list[k] = static_cast<int32_t>(k);
            }
        }
        if (dots) std::memset(s.rows, 0, static_cast<size_t>(at[slivers] * mlp.o * 16) * sizeof(float));
        for (int64_t panel = 0; panel < outputs / kPanelLanes; ++panel) {
            const char* weights = static_cast<const char*>(layer.packed) + panel * Level::panel_bytes(layer.inputs);
            const float* bias = layer.bias + panel * kPanelLanes;
            for (int64_t v = 0; v < slivers; ++v) {
                const int64_t n = at[v + 1] - at[v];
                const char* lines = s.lines[l % 2] + at[v] * Level::row_bytes(inputs);
                if constexpr (kLists) {
                    const int32_t* list = s.list + v * stride;
                    if (dots) {
                        const ReluDots tail = {
                            layer.bias, mlp.last, outputs, mlp.o, s.rows + at[v] * mlp.o * 16, panel * kPanelLanes};
                        multiply_listed<Panel>(n, lines, weights, list, counts[v], s.sums, tail);
                        continue;
                    }
                    multiply_listed<Panel>(n, lines, weights, list, counts[v], s.sums, StoreSums{s.sums});
                } else {
                    Ahead nothing = {weights, 0};
                    Level::multiply(n, lines, weights, layer.inputs, nothing, s.sums);
                }
                if (last) {
                    finish_rows<Float32>(layer.activation, s.sums, bias, n, panel,
                                         plain_rows(s.rows + at[v] * outputs, outputs));
                } else {
                    finish_rows<Level>(layer.activation, s.sums, bias, n, panel, sink(mlp, s, l + 1, v, at));
                }
            }
        }
    }
};

// Where no entry is left out.
struct Dense {
    static constexpr int kEntries = 0;
};

template <class Level, class Panel>
constexpr MlpKernels kMlpKernels = {MlpLevel<Level, Panel>::scratch_bytes, MlpLevel<Level, Panel>::prepare,
                                    MlpLevel<Level, Panel>::evaluate};

}  // namespace
}  // namespace microtome::cpu
