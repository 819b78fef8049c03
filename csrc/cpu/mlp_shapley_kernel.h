// The loops of mlp_shapley, compiled once per instruction set; simd.h has the rules of such files.
//
// Slivers pass from layer to layer as in panel_kernel.h. After a ReLU, entries that are zero in all rows of a sliver
// are left out of the product: as its rows are neighbours of a walk, these are nearly as many as in a single row.
#pragma once

#include "cpu/mlp_shapley_outputs.h"

namespace microtome::cpu {
namespace {

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
            float* answers = values + from * mlp.o;
            if (!mlp.last) {
                for (int64_t r = 0; r < at[slivers]; ++r) {
                    std::memcpy(answers + r * mlp.o, s.rows + r * width, static_cast<size_t>(mlp.o) * sizeof(float));
                }
            } else if (has_dots(mlp)) {
                fold_dots(mlp, s.rows, at[slivers], answers);
            } else {
                last_layer(mlp, s.rows, at[slivers], answers);
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
