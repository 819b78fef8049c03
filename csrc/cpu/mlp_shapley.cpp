#include "cpu/mlp_shapley.h"

#include <algorithm>
#include <cstring>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "cpu/delta_linear_plain.h"
#include "cpu/mlp_shapley_kernel.h"
#include "cpu/pack_weights.h"

namespace microtome::cpu {
namespace {

constexpr int64_t kRowsAtOnce = 8;          // background rows whose values are summed on their own
constexpr int64_t kValuesBytes = 32 << 20;  // of values that wait to be folded
constexpr int64_t kLeastTasks = 2;          // for each thread, before they are folded

const MlpKernels& kernels(const std::string& isa, bool half) {
#if defined(MICROTOME_X86)
    switch (isa_from_name(isa.c_str())) {
        case Isa::kAmx:
            return half ? kMlpHalfAmx : kMlpAvx512;
        case Isa::kAvx512Bf16:
            return half ? kMlpHalfAvx512Bf16 : kMlpAvx512;
        case Isa::kAvx512:
            return half ? kMlpHalfAvx512 : kMlpAvx512;
        case Isa::kAvx2:
            return half ? kMlpHalfAvx2 : kMlpAvx2;
        default:
            break;
    }
#else
    static_cast<void>(isa);
#endif
    return half ? kMlpKernels<Tiles<PlainUnit>, Dense> : kMlpKernels<Float32, FloatPanel>;
}

// Whether every weight is finite.
bool finite(const MlpWeights& W) {
    uint32_t largest = 0;
    for (int64_t r = 0; r < W.o; ++r) {
        const float* row = reinterpret_cast<const float*>(W.data) + r * W.row_stride;
        for (int64_t c = 0; c < W.i; ++c) {
            uint32_t bits;
            std::memcpy(&bits, row + c * W.column_stride, sizeof bits);
            largest = std::max(largest, bits & 0x7fffffffu);
        }
    }
    return largest < 0x7f800000u;
}

// The model in the kernels' layout.
class Model {
  public:
    Model(const MlpShapleyArguments& a, int threads) {
        const int64_t depth = static_cast<int64_t>(a.weights.size());
        mlp_ = {};
        mlp_.m = a.m, mlp_.p = a.p, mlp_.o = a.weights.back().o;
        mlp_.first_outputs = a.weights[0].o, mlp_.first_activation = a.activations[0];
        mlp_.first = reinterpret_cast<const float*>(pack(a.weights[0], false, threads));
        mlp_.first_bias = bias(a, 0);
        sort_columns(a);
        middle_.reserve(static_cast<size_t>(depth));
        for (int64_t l = 1; l + 1 < depth; ++l) {
            const MlpWeights& W = a.weights[l];
            const bool skips = a.activations[l - 1] == kRelu && finite(W);
            middle_.push_back({W.i, W.o, a.activations[l], pack(W, a.half, threads), bias(a, l), skips});
        }
        mlp_.middles = static_cast<int64_t>(middle_.size()), mlp_.middle = middle_.data();
        if (depth == 1) return;
        const MlpWeights& W = a.weights.back();
        const int64_t width = padded(W.i);
        float* last = take(mlp_.o * width);
        for (int64_t r = 0; r < W.o; ++r) {
            const float* row = reinterpret_cast<const float*>(W.data) + r * W.row_stride;
            for (int64_t c = 0; c < W.i; ++c) last[r * width + c] = row[c * W.column_stride];
        }
        mlp_.last = last, mlp_.last_inputs = W.i, mlp_.last_activation = a.activations.back();
        mlp_.last_bias = bias(a, depth - 1);
    }

    const Mlp& operator*() const { return mlp_; }

  private:
    float* take(int64_t floats) {
        const int64_t bytes = std::max<int64_t>(floats, 1) * static_cast<int64_t>(sizeof(float));
        memory_.push_back(aligned(bytes));
        std::memset(memory_.back().get(), 0, static_cast<size_t>(bytes));
        return reinterpret_cast<float*>(memory_.back().get());
    }

    const float* pack(const MlpWeights& W, bool half, int threads) {
        const int64_t floats = panels_of(W.o) * (half ? (W.i + 31) / 32 * 16 : W.i) * kPanelLanes;
        float* out = take(floats);
        pack_weights(W.data, W.o, W.i, W.row_stride, W.column_stride, half, reinterpret_cast<uintptr_t>(out), threads);
        return out;
    }

    const float* bias(const MlpShapleyArguments& a, int64_t layer) {
        const int64_t o = a.weights[layer].o;
        float* out = take(padded(o));
        const auto* from = reinterpret_cast<const float*>(a.biases[layer]);
        if (from) std::memcpy(out, from, static_cast<size_t>(o) * sizeof(float));
        return out;
    }

    // Columns by player, those of one in their own order.
    void sort_columns(const MlpShapleyArguments& a) {
        begin_.assign(static_cast<size_t>(a.p) + 2, 0);
        column_.resize(static_cast<size_t>(std::max<int64_t>(a.m, 1)));
        const auto player = [&a](int64_t c) { return a.player ? a.player[c] : static_cast<int32_t>(c); };
        for (int64_t c = 0; c < a.m; ++c) ++begin_[static_cast<size_t>(player(c) + 2)];
        for (size_t g = 1; g < begin_.size(); ++g) begin_[g] += begin_[g - 1];
        std::vector<int32_t> next(begin_.begin(), begin_.end());
        for (int64_t c = 0; c < a.m; ++c) {
            column_[static_cast<size_t>(next[static_cast<size_t>(player(c) + 1)]++)] = static_cast<int32_t>(c);
        }
        mlp_.column = column_.data(), mlp_.begin = begin_.data();
    }

    Mlp mlp_;
    std::vector<Buffer> memory_;
    std::vector<MiddleLayer> middle_;
    std::vector<int32_t> column_, begin_;
};

// The first order that is no permutation, or -1.
int64_t first_bad_order(const MlpShapleyArguments& a) {
    std::vector<int64_t> last(static_cast<size_t>(a.p), -1);
    for (int64_t order = 0; order < a.S * a.U * a.A; ++order) {
        for (int64_t j = 0; j < a.p; ++j) {
            const int32_t r = a.ranks[order * a.p + j];
            if (r < 0 || r >= a.p || last[static_cast<size_t>(r)] == order) return order;
            last[static_cast<size_t>(r)] = order;
        }
    }
    return -1;
}

// The game as it is walked. A cell is one unit of one stratum and explicand; its coalitions are, in this order, the
// empty one and, for each order of the unit, those of the walk forward and, where paired, of the walk back. Both walks
// start at the empty coalition and end before the full one.
class Game {
  public:
    Game(const MlpShapleyArguments& a, const MlpKernels& kernels, int threads)
        : a_(a), kernels_(kernels), model_(a, threads), walks_(a.paired ? 2 : 1) {
        rows_ = 1 + a.A * walks_ * (a.p - 1), width_ = a.A * walks_ * (a.p + 1) * (*model_).o;
        crossed_ = a.S == 1 && a.n > 1;
        blocks_ = crossed_ ? (a.n + kRowsAtOnce - 1) / kRowsAtOnce : 1;
        full_.resize(static_cast<size_t>(a.e * (*model_).o));
        for (int t = 0; t < threads; ++t) {
            workers_.push_back({aligned(kernels.scratch_bytes(*model_)),
                                std::vector<WalkStep>(static_cast<size_t>(rows_)),
                                std::vector<int32_t>(static_cast<size_t>(a.p)),
                                std::vector<float>(static_cast<size_t>(rows_ * (*model_).o)),
                                std::vector<double>(static_cast<size_t>(width_)), -1, -1});
        }
    }

    void run() {
        const int threads = static_cast<int>(workers_.size());
        const int64_t o = (*model_).o, cells = a_.e * a_.S * a_.U;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t e = 0; e < a_.e; ++e) value_of_all(e, workers_[static_cast<size_t>(omp_get_thread_num())]);
        const int64_t bytes = blocks_ * std::max<int64_t>(width_, 1) * static_cast<int64_t>(sizeof(double));
        const int64_t least = (kLeastTasks * threads + blocks_ - 1) / blocks_;
        const int64_t group = std::min(cells, std::max(least, kValuesBytes / bytes));
        std::vector<double> values(static_cast<size_t>(group * blocks_ * width_));
        for (int64_t from = 0; from < cells; from += group) {
            const int64_t to = std::min(cells, from + group);
#pragma omp parallel num_threads(threads)
            {
                Worker& worker = workers_[static_cast<size_t>(omp_get_thread_num())];
#pragma omp for schedule(dynamic)
                for (int64_t task = 0; task < (to - from) * blocks_; ++task) {
                    walk(from + task / blocks_, task % blocks_, worker, values.data() + task * width_);
                }
#pragma omp for schedule(static)
                for (int64_t stratum = from / a_.U; stratum <= (to - 1) / a_.U; ++stratum) {
                    const int64_t first = std::max(from, stratum * a_.U), last = std::min(to, (stratum + 1) * a_.U);
                    for (int64_t cell = first; cell < last; ++cell) {
                        fold(cell, values.data() + (cell - from) * blocks_ * width_, o, worker);
                    }
                }
            }
        }
    }

  private:
    struct Worker {
        Buffer scratch;
        std::vector<WalkStep> steps;
        std::vector<int32_t> order;
        std::vector<float> values;
        std::vector<double> sums;
        int64_t prepared, walked;  // (explicand, background row) and (stratum, unit) that stand in scratch and steps
    };

    const float* x(int64_t e) const { return a_.x + e * a_.m; }

    void value_of_all(int64_t e, Worker& w) {
        const WalkStep all = {static_cast<int32_t>(a_.p), 1, 1};
        kernels_.prepare(*model_, x(e), x(e), w.scratch.get());
        kernels_.evaluate(*model_, &all, 1, w.scratch.get(), w.values.data());
        std::copy_n(w.values.begin(), (*model_).o, full_.begin() + e * (*model_).o);
    }

    void lay_out_steps(int64_t unit, Worker& w) {
        if (w.walked == unit) return;
        w.walked = unit;
        const auto p = static_cast<int32_t>(a_.p);
        WalkStep* step = w.steps.data();
        *step++ = {p, 1, p};  // and the first walk goes on from here
        for (int64_t order = unit * a_.A; order < (unit + 1) * a_.A; ++order) {
            for (int32_t j = 0; j < p; ++j) w.order[static_cast<size_t>(a_.ranks[order * p + j])] = j;
            for (int32_t t = 0; t + 1 < p; ++t) {
                *step++ = {w.order[static_cast<size_t>(t)], t == 0 && order > unit * a_.A, p - 1 - t};
            }
            for (int32_t t = p - 1; t > 0 && a_.paired; --t) *step++ = {w.order[static_cast<size_t>(t)], t == p - 1, t};
        }
    }

    // sums [A, walks, p + 1, o] = the values of a cell's coalitions, added up over a block of background rows. The last
    // of each walk, the full coalition, is left as it is.
    void walk(int64_t cell, int64_t block, Worker& w, double* sums) {
        const int64_t e = cell / (a_.S * a_.U), stratum = cell / a_.U % a_.S, o = (*model_).o;
        lay_out_steps(cell % (a_.S * a_.U), w);
        const int64_t first = crossed_ ? block * kRowsAtOnce : stratum;
        const int64_t last = crossed_ ? std::min(a_.n, first + kRowsAtOnce) : stratum + 1;
        std::fill_n(sums, width_, 0.0);
        for (int64_t b = first; b < last; ++b) {
            if (w.prepared != e * a_.n + b) {
                kernels_.prepare(*model_, x(e), a_.background + b * a_.m, w.scratch.get());
                w.prepared = e * a_.n + b;
            }
            kernels_.evaluate(*model_, w.steps.data(), rows_, w.scratch.get(), w.values.data());
            const float* none = w.values.data();
            const float* values = none + o;
            double* to = sums;
            for (int64_t walk = 0; walk < a_.A * walks_; ++walk, to += o) {
                for (int64_t j = 0; j < o; ++j) *to++ += none[j];
                for (int64_t i = 0; i < (a_.p - 1) * o; ++i) *to++ += *values++;
            }
        }
    }

    // The unit's mean gain of every player, and what it does to mean and m2.
    void fold(int64_t cell, const double* blocks, int64_t o, Worker& w) {
        const int64_t e = cell / (a_.S * a_.U), unit = cell % (a_.S * a_.U), p = a_.p, walk = (p + 1) * o;
        double* v = w.sums.data();
        for (int64_t i = 0; i < width_; ++i) {
            v[i] = blocks[i];
            for (int64_t b = 1; b < blocks_; ++b) v[i] += blocks[b * width_ + i];
            if (crossed_) v[i] /= static_cast<double>(a_.n);
        }
        for (int64_t i = 0; i < a_.A * walks_; ++i) {
            std::copy_n(full_.begin() + e * o, o, v + i * walk + p * o);
        }
        const auto number = static_cast<double>(cell % a_.U + 1), share = static_cast<double>(a_.A * walks_);
        double *mean = a_.mean + cell / a_.U * p * o, *m2 = a_.m2 + cell / a_.U * p * o;
        for (int64_t j = 0; j < p; ++j) {
            for (int64_t q = 0; q < o; ++q, ++mean, ++m2) {
                double gain = 0;
                for (int64_t order = 0; order < a_.A; ++order) {
                    const int64_t r = a_.ranks[(unit * a_.A + order) * p + j];
                    const double* at = v + order * walks_ * walk + r * o + q;
                    gain += at[o] - at[0];
                    if (!a_.paired) continue;
                    at = v + (order * walks_ + 1) * walk + (p - 1 - r) * o + q;  // the players after j go first
                    gain += at[o] - at[0];
                }
                const double before = gain / share - *mean;
                *mean += before / number;
                *m2 += before * (gain / share - *mean);
            }
        }
    }

    const MlpShapleyArguments& a_;
    const MlpKernels& kernels_;
    Model model_;
    int64_t walks_, rows_, width_, blocks_;
    bool crossed_;
    std::vector<double> full_;
    std::vector<Worker> workers_;
};

}  // namespace

int64_t mlp_shapley(const MlpShapleyArguments& a, const std::string& isa, int threads) {
    const int64_t bad = first_bad_order(a);
    if (bad >= 0) return bad;
    const int64_t size = a.e * a.S * a.p * a.weights.back().o;
    std::fill_n(a.mean, size, 0.0);
    std::fill_n(a.m2, size, 0.0);
    if (size > 0) Game(a, kernels(isa, a.half), std::max(threads, 1)).run();
    return -1;
}

}  // namespace microtome::cpu
