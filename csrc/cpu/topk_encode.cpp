#include "cpu/topk_encode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "common/cache.h"
#include "common/parallel.h"
#include "cpu/screen_row.h"
#include "cpu/topk_encode_exact.h"

namespace microtome::cpu {

const TopkKernels topk_generic = {nullptr, kExactRows, 1, screen_exact, rescore, nullptr, screen_row};

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kScratch = 24 << 20;    // bytes of rows and lists in one pass over the features
constexpr int64_t kBlockBytes = 4 << 20;  // bytes of shadow that all rows of a pass visit before the next block
constexpr int64_t kSmallestBlock = 32;    // features; the AMX kernel reads 32 rows of weights at a time

int64_t ceil_to(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

const TopkKernels& kernels_for(Isa isa) {
#if defined(MICROTOME_X86)
    switch (isa) {
        case Isa::kAmx:
            return topk_amx[amx_is_emulated()];
        case Isa::kAvx512Bf16:  // integers screen more sharply than bf16, at the same rate
        case Isa::kAvx512:
            return topk_avx512;
        case Isa::kAvx2:
            return topk_avx2;
        default:
            break;
    }
#else
    (void)isa;
#endif
    return topk_generic;
}

bool all_finite(const float* x, int64_t d) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < d; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        bad |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return bad == 0;
}

// Value descending, index ascending. A type, not a function: sorting is to see through it.
struct Before {
    bool operator()(const Hit& a, const Hit& b) const {
        return a.lower > b.lower || (a.lower == b.lower && a.index < b.index);
    }
};

// Half of a core's second-level cache holds the packed rows of one block.
int64_t row_block(int64_t bytes_per_row) {
    const int64_t rows = second_level_cache() / 2 / std::max<int64_t>(bytes_per_row, 1);
    return std::max<int64_t>(2 * kPanel, rows / (2 * kPanel) * (2 * kPanel));
}

// One pass: the rows in `rows` (numbers into x) against every feature.
class Pass {
  public:
    Pass(const TopkArguments& a, const TopkKernels& kernels, bool screened)
        : a_(a), kernels_(kernels), screened_(screened), granule_(screened ? kernels.screen_rows : kExactRows) {
        capacity_ = screened ? std::max<int64_t>(512, 6 * a.k + 256) : 2 * a.k + 64;
        capacity_ = std::min(capacity_, ceil_to(a.f, 16) + 64);
        padded_ = ceil_to(a.d, 32);
        const int64_t per_row = capacity_ * static_cast<int64_t>(sizeof(Hit)) + padded_ * (screened ? 6 : 4) + 64;
        most_rows_ = std::max<int64_t>(granule_, kScratch / per_row / 32 * 32);
    }

    bool weights_bad() const { return weights_bad_; }

    int64_t most_rows() const { return most_rows_; }

    // Answers rows. Those whose list overflowed are appended to `failed`, those with no finite answer to `bad`.
    void run(const int64_t* rows, int64_t n, std::vector<int64_t>& failed, std::vector<int64_t>& bad) {
        const int64_t threads = std::max(a_.threads, 1);
        const int64_t groups = (n + granule_ - 1) / granule_;
        slices_ = std::max<int64_t>(1, std::min(threads / groups, a_.f / 1024));
        const int64_t workers = std::max<int64_t>(1, threads / slices_);
        slots_ = groups * granule_;
        allocate();
        state_.assign(slots_, kAnswered);
        // Row ranges of the workers, in whole granules.
        auto edge = [&](int64_t w) { return groups * w / workers * granule_; };
        const int64_t block = block_features();

#pragma omp parallel num_threads(a_.threads)
        {
            std::vector<int16_t> codes(padded_ + 32);
            Memory memory{{}, std::vector<float>(capacity_ + kPanel)};
#pragma omp for schedule(static)
            for (int64_t r = 0; r < slots_; ++r) load_row(r < n ? rows[r] : -1, r, codes.data());

            const int64_t team = omp_get_num_threads();
            for (int64_t start = 0; start < a_.f; start = next(start, block)) {
                const int64_t stop = next(start, block);
                if (screened_ && !a_.shadow) {
#pragma omp for schedule(static)
                    for (int64_t f = start; f < stop; ++f) {
                        const bool finite = kernels_.screen_row(a_.weights + f * a_.d, a_.d, a_.stride, kernels_.kind,
                                                                cold_shadow_.get() + (f - start) * a_.stride,
                                                                cold_stats_.data() + (f - start) * 4);
                        if (!finite) weights_bad_ = true;
                    }
                }
                for (int64_t t = omp_get_thread_num(); t < workers * slices_; t += team) {
                    const int64_t worker = t / slices_, slice = t % slices_;
                    const int64_t size = stop - start;
                    visit(start, size * slice / slices_, size * (slice + 1) / slices_, edge(worker), edge(worker + 1),
                          slice, memory.floats.data());
                }
                if (screened_ && !a_.shadow) {
#pragma omp barrier
                }
            }
#pragma omp barrier
#pragma omp for schedule(dynamic, 8)
            for (int64_t r = 0; r < n; ++r) finish(rows[r], r, memory);
        }
        for (int64_t r = 0; r < n; ++r) {
            if (state_[r] == kOverflowed) failed.push_back(rows[r]);
            if (state_[r] == kBad) bad.push_back(rows[r]);
        }
    }

  private:
    enum State : uint8_t { kAnswered, kOverflowed, kBad };

    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    template <class T>
    using Aligned = std::unique_ptr<T[], Free>;
    template <class T>
    static Aligned<T> aligned(int64_t count) {
        const size_t bytes = static_cast<size_t>(ceil_to(std::max<int64_t>(count, 1) * sizeof(T), 64));
        void* p = std::aligned_alloc(64, bytes);
        if (!p) throw std::bad_alloc();
        return Aligned<T>(static_cast<T*>(p));
    }

    int64_t block_features() const {
        if (!screened_) return a_.f;
        return std::max<int64_t>(kSmallestBlock, kBlockBytes / (a_.stride * 2));
    }

    // The end of the block that begins at `start`; a remainder too small for a tile joins the last block.
    int64_t next(int64_t start, int64_t block) const {
        return a_.f - start < block + kSmallestBlock ? a_.f : start + block;
    }

    void allocate() {
        const int64_t lists = slots_ * slices_;
        x_ = aligned<float>(slots_ * a_.d);
        hits_ = aligned<Hit>(lists * capacity_);
        threshold_.assign(lists, -kInfinity);
        count_.assign(lists, 0);
        limit_.assign(lists, static_cast<int32_t>(std::min<int64_t>(capacity_, std::max<int64_t>(192, 4 * a_.k))));
        if (!screened_) return;
        packed_ = aligned<int16_t>(slots_ * padded_);
        for (auto* v : {&scale_, &error_w_, &error_r_}) v->assign(slots_, 0.0f);
        if (!a_.shadow) {
            const int64_t most = block_features() + kSmallestBlock;
            cold_shadow_ = aligned<int16_t>(most * a_.stride);
            cold_stats_.assign(most * 4, 0.0f);
        }
    }

    // Centre one row, bound its rounding error, and pack its low-precision codes beside its panel's. Row -1 is padding.
    void load_row(int64_t row, int64_t r, int16_t* codes) {
        float* x = x_.get() + r * a_.d;
        if (row < 0) {
            std::fill(x, x + a_.d, 0.0f);
            for (int64_t s = 0; s < slices_; ++s) close(s * slots_ + r);
        } else {
            const float* source = a_.x + row * a_.x_stride;
            for (int64_t i = 0; i < a_.d; ++i) x[i] = a_.center ? source[i] - a_.center[i] : source[i];
            if (!all_finite(x, a_.d)) {
                state_[r] = kBad;
                std::fill(x, x + a_.d, 0.0f);
                for (int64_t s = 0; s < slices_; ++s) close(s * slots_ + r);
            }
        }
        if (!screened_) return;
        float stats[4];
        kernels_.screen_row(x, a_.d, padded_, kernels_.kind, codes, stats);
        int16_t* packed = packed_.get() + r / kPanel * kPanel * padded_ + r % kPanel * 2;
        for (int64_t p = 0; p < padded_ / 2; ++p) std::memcpy(packed + p * kPanel * 2, codes + 2 * p, 4);
        // |x.w - xs.ws| <= |x - xs||w| + |xs||w - ws|; the rest bounds the float32 roundings of the screen's and of the
        // exact sum (docs/exactness.md), and the factor those of this arithmetic.
        const float step = 0x1p-24f, up = 1.0f + 0x1p-10f;
        const float exact = static_cast<float>(a_.d / 16 + 8) * step;
        const float screen = kernels_.kind == 0 ? 1.02f * static_cast<float>(a_.d + 32) * step : 0.0f;
        scale_[r] = stats[0];
        error_w_[r] = up * (stats[2] + (exact + screen + 0x1p-20f) * stats[1]);
        error_r_[r] = up * (stats[1] + stats[2]);
    }

    // No hit will enter this list any more.
    void close(int64_t list) {
        threshold_[list] = kInfinity;
        count_[list] = -1;
    }

    void visit(int64_t start, int64_t f0, int64_t f1, int64_t r0, int64_t r1, int64_t slice, float* scratch) {
        Screening s;
        s.shadow = a_.shadow ? a_.shadow + start * a_.stride : cold_shadow_.get();
        s.stats = a_.stats ? a_.stats + start * 4 : cold_stats_.data();
        s.stride = a_.stride;
        s.weights = a_.weights + start * a_.d;
        s.bias = a_.bias ? a_.bias + start : nullptr;
        s.first_feature = start;
        s.packed = packed_.get();
        s.x = x_.get();
        s.d = a_.d;
        s.padded = padded_;
        s.scale = scale_.data();
        s.error_w = error_w_.data();
        s.error_r = error_r_.data();
        s.tiny = kernels_.kind == 0 ? std::ldexp(static_cast<float>(a_.d + 32), -125) : 0x1p-94f;
        s.threshold = threshold_.data() + slice * slots_;
        s.hits = hits_.get() + slice * slots_ * capacity_;
        s.count = count_.data() + slice * slots_;
        s.limit = limit_.data() + slice * slots_;
        s.capacity = capacity_;
        s.k = a_.k;
        s.scratch = scratch;
        if (f0 == f1) return;
        const int64_t rows = screened_ ? row_block(padded_ * 2) : r1 - r0;
        for (int64_t r = r0; r < r1; r += rows) {
            (screened_ ? kernels_.screen : kernels_.exact)(s, f0, f1, r, std::min(r + rows, r1));
        }
    }

    struct Memory {  // of one thread
        std::vector<Hit> merged;
        std::vector<float> floats;
    };

    // Turn a row's lists into its answer, or say why there is none.
    void finish(int64_t row, int64_t r, Memory& memory) {
        if (state_[r] == kBad) return;
        const State none = screened_ ? kOverflowed : kBad;
        state_[r] = none;
        Hit* hits = hits_.get() + r * capacity_;
        int64_t n = count_[r];
        float floor = threshold_[r];
        if (slices_ > 1) {
            memory.merged.clear();
            for (int64_t list = r; list < r + slices_ * slots_; list += slots_) {
                if (count_[list] < 0) return;
                const Hit* first = hits_.get() + list * capacity_;
                memory.merged.insert(memory.merged.end(), first, first + count_[list]);
                floor = std::max(floor, threshold_[list]);
            }
            hits = memory.merged.data();
            n = static_cast<int64_t>(memory.merged.size());
        }
        if (n < a_.k) return;
        for (int64_t j = 0; j < n; ++j) {
            if (hits[j].lower != hits[j].lower) return;  // a bound that overflowed
        }
        a_.candidates[row] = static_cast<int32_t>(a_.f);
        if (screened_) {
            n = survivors(x_.get() + r * a_.d, hits, n, floor, memory.floats);
            if (n < 0) return;
            a_.candidates[row] = static_cast<int32_t>(n);
        }
        state_[r] = answer(row, hits, n) ? kAnswered : none;
    }

    // Write the k largest values, which are the hits' `lower` by now; false if one is not finite.
    bool answer(int64_t row, Hit* hits, int64_t n) {
        const int64_t k = a_.k;
        if (n > k) std::nth_element(hits, hits + k, hits + n, Before());
        std::sort(hits, hits + k, Before());
        bool finite = true;
        for (int64_t j = 0; j < k; ++j) {
            a_.values[row * k + j] = hits[j].lower;
            a_.indices[row * k + j] = hits[j].index;
            finite &= std::isfinite(hits[j].lower);
        }
        return finite;
    }

    // Replace the bounds of the hits that matter by float32 values (in `lower`) and drop the rest.
    int64_t survivors(const float* x, Hit* hits, int64_t n, float floor, std::vector<float>& floats) {
        const int64_t k = a_.k;
        floats.resize(n + kPanel);
        n = kernels_.best(hits, n, k, floor, floats.data());
        // The k best by their lower bound are computed first: the least of them is a bound for the k-th largest value.
        float* exact = floats.data();
        kernels_.rescore(x, a_.weights, a_.d, hits, k, a_.bias, exact);
        float least = kInfinity;
        for (int64_t j = 0; j < k; ++j) {
            if (!(exact[j] >= hits[j].lower && exact[j] <= hits[j].upper)) return -1;  // overflow or NaN in a bound
            least = std::min(least, exact[j]);
            hits[j].lower = exact[j];
        }
        if (a_.fast) return k;
        int64_t kept = k;
        for (int64_t j = k; j < n; ++j) {
            if (!(hits[j].upper < least)) hits[kept++] = hits[j];
        }
        kernels_.rescore(x, a_.weights, a_.d, hits + k, kept - k, a_.bias, exact);
        for (int64_t j = k; j < kept; ++j) hits[j].lower = exact[j - k];
        return kept;
    }

    const TopkArguments& a_;
    const TopkKernels& kernels_;
    const bool screened_;
    const int64_t granule_;
    int64_t capacity_, padded_, most_rows_, slots_ = 0, slices_ = 1;
    Aligned<float> x_;
    Aligned<int16_t> packed_, cold_shadow_;
    Aligned<Hit> hits_;
    std::vector<float> threshold_, scale_, error_w_, error_r_, cold_stats_;
    std::vector<int32_t> count_, limit_;
    std::vector<uint8_t> state_;
    std::atomic<bool> weights_bad_{false};
};

}  // namespace

void prune_exact(const Screening& s, int64_t row) {
    Hit* hits = s.hits + row * s.capacity;
    std::nth_element(hits, hits + (s.k - 1), hits + s.count[row], Before());
    s.threshold[row] = hits[s.k - 1].lower;
    s.count[row] = static_cast<int32_t>(s.k);
}

int screen_kind(Isa isa) { return kernels_for(isa).kind; }

void topk_encode(const TopkArguments& a, Isa isa) {
    const TopkKernels& kernels = kernels_for(isa);
    *a.bad_row = *a.bad_feature = -1;
    for (int64_t f = 0; f < a.f; ++f) {
        // The norm of a finite row may overflow too; such a feature is screened with an infinite bound.
        const bool suspect = a.shadow && !std::isfinite(a.stats[f * 4 + 1]);
        if ((a.bias && !std::isfinite(a.bias[f])) || (suspect && !all_finite(a.weights + f * a.d, a.d))) {
            *a.bad_feature = f;
            return;
        }
    }
    std::vector<int64_t> rows(a.n), failed, bad;
    for (int64_t r = 0; r < a.n; ++r) rows[r] = r;
    auto all = [&](bool screened, const std::vector<int64_t>& which, std::vector<int64_t>& rest) {
        Pass pass(a, kernels, screened);
        const int64_t n = static_cast<int64_t>(which.size());
        for (int64_t r = 0; r < n; r += pass.most_rows()) {
            pass.run(which.data() + r, std::min(pass.most_rows(), n - r), rest, bad);
            if (pass.weights_bad()) bad.push_back(which[r]);
        }
    };
    // Where nearly every feature is an answer, or there are few, a screen cannot pay.
    const bool screened = kernels.screen && a.f >= 2 * kSmallestBlock && a.f >= 8 * a.k;
    std::vector<int64_t> none;
    all(screened, rows, screened ? failed : none);
    if (!failed.empty()) all(false, failed, none);
    if (bad.empty()) return;
    *a.bad_row = *std::min_element(bad.begin(), bad.end());
    for (int64_t f = 0; f < a.f; ++f) {
        if (!all_finite(a.weights + f * a.d, a.d)) {
            *a.bad_feature = f;
            return;
        }
    }
}

}  // namespace microtome::cpu
