#include "cpu/mlp_shapley.h"

#include <algorithm>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "cpu/delta_linear_plain.h"
#include "cpu/mlp_shapley_kernel.h"
#include "cpu/mlp_shapley_model.h"

namespace microtome::cpu {
namespace {

constexpr int64_t kRowsAtOnce = 8;         // background rows whose values are summed on their own
constexpr int64_t kValuesBytes = 4 << 20;  // of values that wait to be folded
constexpr int64_t kTasks = 8;              // for each thread, at least, where there are so many

const MlpKernels& kernels(const std::string& isa, bool half) {
#if defined(MICROTOME_X86)
    switch (isa_from_name(isa.c_str())) {
        case Isa::kAmx:
            return half ? kMlpHalfAmx[amx_is_emulated()] : kMlpAvx512;
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
        const int64_t tasks = std::max(a.e, a.e * a.S * a.U * blocks_);
        for (int64_t t = 0; t < std::clamp<int64_t>(threads, 1, tasks); ++t) {
            workers_.push_back({aligned(kernels.scratch_bytes(*model_)),
                                std::vector<WalkStep>(static_cast<size_t>(rows_)),
                                std::vector<int32_t>(static_cast<size_t>(a.p)),
                                std::vector<float>(static_cast<size_t>(rows_ * (*model_).o)),
                                std::vector<double>(static_cast<size_t>(width_)),
                                std::vector<double>(static_cast<size_t>((*model_).o)), -1, -1});
        }
    }

    void run() {
        const int threads = static_cast<int>(workers_.size());
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t e = 0; e < a_.e; ++e) value_of_all(e, workers_[static_cast<size_t>(omp_get_thread_num())]);
        if (blocks_ == 1 && a_.e * a_.S >= kTasks * threads) {
            run_strata(threads);
        } else {
            run_cells(threads);
        }
    }

  private:
    struct Worker {
        Buffer scratch;
        std::vector<WalkStep> steps;
        std::vector<int32_t> order;
        std::vector<float> values;
        std::vector<double> sums, gains;
        int64_t prepared, walked;  // (explicand, background row) and (stratum, unit) that stand in scratch and steps
    };

    // Where strata are many: the units of one after another.
    void run_strata(int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (int64_t stratum = 0; stratum < a_.e * a_.S; ++stratum) {
            Worker& worker = workers_[static_cast<size_t>(omp_get_thread_num())];
            for (int64_t cell = stratum * a_.U; cell < (stratum + 1) * a_.U; ++cell) {
                walk(cell, 0, worker, worker.sums.data());
                fold(cell, worker.sums.data(), worker);
            }
        }
    }

    // Otherwise: a group of cells in blocks of background rows, then their sums in order.
    void run_cells(int threads) {
        const int64_t cells = a_.e * a_.S * a_.U, bytes = blocks_ * width_ * static_cast<int64_t>(sizeof(double));
        const int64_t least = (kTasks * threads + blocks_ - 1) / blocks_;
        const int64_t group = std::min(cells, std::max(least, kValuesBytes / bytes));
        const Buffer values = aligned(group * bytes);
        const auto sums = [&values, bytes](int64_t cell) { return values.get() + cell * bytes; };
        for (int64_t from = 0; from < cells; from += group) {
            const int64_t to = std::min(cells, from + group);
#pragma omp parallel num_threads(threads)
            {
                Worker& worker = workers_[static_cast<size_t>(omp_get_thread_num())];
#pragma omp for schedule(dynamic)
                for (int64_t task = 0; task < (to - from) * blocks_; ++task) {
                    auto* blocks = reinterpret_cast<double*>(sums(task / blocks_));
                    walk(from + task / blocks_, task % blocks_, worker, blocks + task % blocks_ * width_);
                }
#pragma omp for schedule(static)
                for (int64_t stratum = from / a_.U; stratum <= (to - 1) / a_.U; ++stratum) {
                    const int64_t first = std::max(from, stratum * a_.U), last = std::min(to, (stratum + 1) * a_.U);
                    for (int64_t cell = first; cell < last; ++cell) {
                        fold(cell, reinterpret_cast<double*>(sums(cell - from)), worker);
                    }
                }
            }
        }
    }

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
        for (int64_t b = first; b < last; ++b) {
            if (w.prepared != e * a_.n + b) {
                kernels_.prepare(*model_, x(e), a_.background + b * a_.m, w.scratch.get());
                w.prepared = e * a_.n + b;
            }
            kernels_.evaluate(*model_, w.steps.data(), rows_, w.scratch.get(), w.values.data());
            const float* none = w.values.data();
            const float* values = none + o;
            double* to = sums;
            for (int64_t walk = 0; walk < a_.A * walks_; ++walk, to += (a_.p + 1) * o, values += (a_.p - 1) * o) {
                put(none, o, b == first, to);
                put(values, (a_.p - 1) * o, b == first, to + o);
            }
        }
    }

    static void put(const float* values, int64_t count, bool first, double* to) {
        if (first) {
            for (int64_t i = 0; i < count; ++i) to[i] = static_cast<double>(values[i]);
        } else {
            for (int64_t i = 0; i < count; ++i) to[i] += static_cast<double>(values[i]);
        }
    }

    // The unit's mean gain of every player, and what it does to mean and m2. The sums of all blocks are added to the
    // first.
    void fold(int64_t cell, double* v, Worker& w) {
        if ((*model_).o == 1) {
            fold_outputs<1>(cell, v, w);
        } else {
            fold_outputs<0>(cell, v, w);
        }
    }

    // kOutputs: their number where the compiler is to know it, else 0.
    template <int64_t kOutputs>
    void fold_outputs(int64_t cell, double* v, Worker& w) {
        const int64_t e = cell / (a_.S * a_.U), unit = cell % (a_.S * a_.U), p = a_.p;
        const int64_t o = kOutputs ? kOutputs : (*model_).o, walk = (p + 1) * o;
        for (const double* block = v + width_; block < v + blocks_ * width_; block += width_) {
            for (int64_t i = 0; i < width_; ++i) v[i] += block[i];
        }
        const double rows = crossed_ ? static_cast<double>(a_.n) : 1;
        for (int64_t i = 0; i < a_.A * walks_; ++i) {
            for (int64_t q = 0; q < o; ++q) v[i * walk + p * o + q] = rows * full_[static_cast<size_t>(e * o + q)];
        }
        const double share = 1 / (rows * static_cast<double>(a_.A * walks_));
        const double weight = 1 / static_cast<double>(cell % a_.U + 1);
        double *mean = a_.mean + cell / a_.U * p * o, *m2 = a_.m2 + cell / a_.U * p * o, *gain = w.gains.data();
        for (int64_t j = 0; j < p; ++j, mean += o, m2 += o) {
            std::fill_n(gain, o, 0.0);
            for (int64_t order = 0; order < a_.A; ++order) {
                const int64_t r = a_.ranks[(unit * a_.A + order) * p + j];
                const double* at = v + order * walks_ * walk + r * o;
                for (int64_t q = 0; q < o; ++q) gain[q] += at[o + q] - at[q];
                if (!a_.paired) continue;
                at = v + (order * walks_ + 1) * walk + (p - 1 - r) * o;  // the players after j go first
                for (int64_t q = 0; q < o; ++q) gain[q] += at[o + q] - at[q];
            }
            for (int64_t q = 0; q < o; ++q) {
                const double before = gain[q] * share - mean[q];
                mean[q] += before * weight;
                m2[q] += before * (gain[q] * share - mean[q]);
            }
        }
    }

    const MlpShapleyArguments& a_;
    const MlpKernels& kernels_;
    MlpModel model_;
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
