#include "cpu/sae_update.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/segments.h"
#include "cpu/sae_update_kernel.h"

namespace microtome::cpu {
namespace {

constexpr int64_t kRows = 16;  // rows of grad_out summed in one go

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Moments of features that never fire decay into denormals and stay there, and a denormal costs some processors a
// hundred cycles. While one of these lives, results below 2^-126 become zero in this thread.
class FlushDenormals {
#if defined(MICROTOME_X86)
  public:
    FlushDenormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8000u); }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }

  private:
    unsigned saved_;
#else
  public:
    FlushDenormals() {}
#endif
};

const SaeUpdateKernels& kernels_for(const char* isa) {
#if defined(MICROTOME_X86)
    const Isa level = isa_from_name(isa);
    if (level >= Isa::kAvx512) return kSaeUpdateAvx512;
    if (level >= Isa::kAvx2) return kSaeUpdateAvx2;
#else
    (void)isa;
#endif
    return kSaeUpdateKernels;
}

Step fold_step(const char* optimizer, double lr, double beta1, double beta2, double eps, double decay, int64_t step) {
    const bool adam = std::strncmp(optimizer, "adam", 4) == 0, sgd = std::strcmp(optimizer, "sgd") == 0;
    const bool l2 = sgd || std::strcmp(optimizer, "adam") == 0;
    const double t = static_cast<double>(step);
    Step s{};
    s.rule = adam ? Rule::kAdam : sgd ? Rule::kSgd : Rule::kSign;
    s.l2 = static_cast<float>(l2 ? decay : 0.0);
    s.shrink = static_cast<float>(l2 ? 1.0 : 1.0 - lr * decay);
    s.beta1 = static_cast<float>(beta1);
    s.rest1 = static_cast<float>(1 - beta1);
    s.beta2 = static_cast<float>(beta2);
    s.rest2 = static_cast<float>(1 - beta2);
    s.inverse_correction = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, t)));
    s.eps = static_cast<float>(eps);
    s.lr = static_cast<float>(adam ? lr / (1 - std::pow(beta1, t)) : lr);
    return s;
}

// One code as it came, and where its entries begin among all.
struct Source {
    int64_t k, begin;
    uintptr_t indices;
    int index_bytes;
    const float *values, *grads;
    float scale;

    int32_t index(int64_t e) const {
        return index_bytes == 8 ? static_cast<int32_t>(at<const int64_t>(indices)[e]) : at<const int32_t>(indices)[e];
    }
};

// Entries sorted by latent; those with neither value nor gradient go into a last segment that nobody reads.
void sort_entries(const Source (&sources)[2], int64_t n, int64_t f, std::vector<Entry>& entries,
                  std::vector<int64_t>& offsets, int threads) {
    const int64_t m = n * (sources[0].k + sources[1].k);
    std::vector<int32_t> keys(static_cast<size_t>(m));
    std::vector<int64_t> order(static_cast<size_t>(m));
    for (const Source& s : sources) {
#pragma omp parallel for num_threads(threads)
        for (int64_t e = 0; e < n * s.k; ++e) {
            const bool idle = s.values[e] == 0.0f && s.grads[e] == 0.0f;
            keys[static_cast<size_t>(s.begin + e)] = idle ? static_cast<int32_t>(f) : s.index(e);
        }
    }
    entries.resize(static_cast<size_t>(m));
    offsets.resize(static_cast<size_t>(f + 2));
    sort_by_latent(keys.data(), m, f + 1, order.data(), offsets.data(), threads);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < offsets[static_cast<size_t>(f)]; ++i) {
        const int64_t whole = order[static_cast<size_t>(i)];
        const int aux = whole >= sources[1].begin;
        const Source& s = sources[aux];
        const int64_t e = whole - s.begin;
        entries[static_cast<size_t>(i)] = {static_cast<int32_t>(e / s.k), aux, s.scale * s.values[e],
                                           s.scale * s.grads[e]};
    }
}

// The segments of more than kChunk entries, summed chunk by chunk, so that a latent of every row keeps all threads
// busy.
void sum_long_segments(Pass& a, int64_t f, const SaeUpdateKernels& kernels, std::vector<int32_t>& partial,
                       std::vector<float>& partials, int threads) {
    std::vector<int64_t> begins, counts;
    for (int64_t g = 0; g < f; ++g) {
        if (a.offsets[g + 1] - a.offsets[g] <= kChunk) continue;
        if (partial.empty()) partial.resize(static_cast<size_t>(f));
        partial[static_cast<size_t>(g)] = static_cast<int32_t>(begins.size());
        for (int64_t e = a.offsets[g]; e < a.offsets[g + 1]; e += kChunk) {
            begins.push_back(e);
            counts.push_back(std::min(kChunk, a.offsets[g + 1] - e));
        }
    }
    const int64_t chunks = static_cast<int64_t>(begins.size());
    partials.resize(static_cast<size_t>(chunks * 2 * a.d));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t c = 0; c < chunks; ++c) {
        const size_t i = static_cast<size_t>(c);
        float* sums = partials.data() + c * 2 * a.d;
        kernels.sum_entries(a, a.entries + begins[i], counts[i], sums, sums + a.d);
    }
    a.partial = partial.data();
    a.partials = partials.data();
}

// sums[j] += scale * sum of the rows' column j, in the rows' order.
void fold_rows(const std::vector<float>& rows, int64_t d, double scale, std::vector<double>& sums, int threads) {
    const int64_t count = static_cast<int64_t>(rows.size()) / d;
    constexpr int64_t kColumns = 64;
#pragma omp parallel for num_threads(threads)
    for (int64_t j = 0; j < d; j += kColumns) {
        const int64_t width = std::min(kColumns, d - j);
        double column[kColumns] = {};
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t c = 0; c < width; ++c) column[c] += rows[static_cast<size_t>(i * d + j + c)];
        }
        for (int64_t c = 0; c < width; ++c) sums[static_cast<size_t>(j + c)] += scale * column[c];
    }
}

}  // namespace

int64_t sae_update(int64_t n, int64_t d, int64_t f, int64_t k, uintptr_t indices, int index_bytes, uintptr_t values,
                   uintptr_t grad_values, uintptr_t grad_out, double scale, int64_t a, uintptr_t aux_indices,
                   int aux_index_bytes, uintptr_t aux_values, uintptr_t aux_grad_values, uintptr_t aux_grad_out,
                   double aux_scale, uintptr_t x, uintptr_t W_enc, uintptr_t b_enc, uintptr_t W_dec, uintptr_t b_dec,
                   uintptr_t m_W_enc, uintptr_t v_W_enc, uintptr_t m_b_enc, uintptr_t v_b_enc, uintptr_t m_W_dec,
                   uintptr_t v_W_dec, uintptr_t m_b_dec, uintptr_t v_b_dec, int kind, int64_t stride, uintptr_t shadow,
                   uintptr_t stats, uintptr_t W_enc_bf16, uintptr_t W_dec_bf16, uintptr_t place, uintptr_t extra_enc,
                   uintptr_t extra_bias, uintptr_t extra_dec, const char* optimizer, double lr, double beta1,
                   double beta2, double eps, double weight_decay, int64_t step, bool rowsparse, bool project,
                   bool renorm, bool center, uintptr_t fired, const char* isa, int threads) {
    const SaeUpdateKernels& kernels = kernels_for(isa);
    const Source sources[2] = {
        {k, 0, indices, index_bytes, at<const float>(values), at<const float>(grad_values), static_cast<float>(scale)},
        {a, n * k, aux_indices, aux_index_bytes, at<const float>(aux_values), at<const float>(aux_grad_values),
         static_cast<float>(aux_scale)},
    };
    int32_t* counts = at<int32_t>(fired);
    std::fill(counts, counts + f, 0);
    for (int64_t e = 0; e < n * k; ++e) {
        if (sources[0].values[e] > 0.0f) ++counts[sources[0].index(e)];
    }

    std::vector<Entry> entries;
    std::vector<int64_t> offsets;
    sort_entries(sources, n, f, entries, offsets, threads);

    std::vector<float> db_enc(static_cast<size_t>(f));
    Pass pass{};
    pass.d = d;
    pass.x = at<const float>(x);
    pass.grad_out[0] = at<const float>(grad_out);
    pass.grad_out[1] = at<const float>(aux_grad_out);
    pass.entries = entries.data();
    pass.offsets = offsets.data();
    pass.W_enc = at<float>(W_enc);
    pass.b_enc = at<float>(b_enc);
    pass.W_dec = at<float>(W_dec);
    pass.enc = {at<float>(m_W_enc), at<float>(v_W_enc)};
    pass.bias = {at<float>(m_b_enc), at<float>(v_b_enc)};
    pass.dec = {at<float>(m_W_dec), at<float>(v_W_dec)};
    pass.db_enc = db_enc.data();
    pass.kind = kind;
    pass.stride = stride;
    pass.shadow = at<int16_t>(shadow);
    pass.stats = at<float>(stats);
    pass.W_enc_bf16 = at<bf16>(W_enc_bf16);
    pass.W_dec_bf16 = at<bf16>(W_dec_bf16);
    pass.place = at<const int32_t>(place);
    pass.extra_enc = at<const float>(extra_enc);
    pass.extra_bias = at<const float>(extra_bias);
    pass.extra_dec = at<const float>(extra_dec);
    pass.weights = fold_step(optimizer, lr, beta1, beta2, eps, weight_decay, step);
    pass.biases = fold_step(optimizer, lr, beta1, beta2, eps, 0.0, step);
    pass.rowsparse = rowsparse;
    pass.project = project;
    pass.renorm = renorm;
    pass.center = center;

    std::vector<int32_t> partial;
    std::vector<float> partials;
    sum_long_segments(pass, f, kernels, partial, partials, threads);

    const int64_t row_chunks = (n + kRows - 1) / kRows;
    std::vector<float> row_parts(static_cast<size_t>(row_chunks * d));
#pragma omp parallel for num_threads(threads)
    for (int64_t c = 0; c < row_chunks; ++c) {
        kernels.sum_rows(pass.grad_out[0] + c * kRows * d, std::min(kRows, n - c * kRows), d, row_parts.data() + c * d);
    }

    // Fixed blocks of features, whoever takes them: the encoder's part of b_dec's gradient adds up the same way.
    const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(256, f / 4));
    std::vector<float> encoder_parts(static_cast<size_t>(blocks * d));
    std::vector<int64_t> bad(static_cast<size_t>(blocks), -1);
#pragma omp parallel num_threads(threads)
    {
        const FlushDenormals flush;
        std::vector<float> scratch(static_cast<size_t>(2 * d));
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < blocks; ++b) {
            bad[static_cast<size_t>(b)] = kernels.update_features(pass, f * b / blocks, f * (b + 1) / blocks,
                                                                  encoder_parts.data() + b * d, scratch.data());
        }
    }

    std::vector<double> sums(static_cast<size_t>(d));
    fold_rows(row_parts, d, scale, sums, threads);
    fold_rows(encoder_parts, d, 1.0, sums, threads);
    const std::vector<float> db_dec(sums.begin(), sums.end());
    kernels.update_vector(pass.biases, at<float>(b_dec), db_dec.data(), {at<float>(m_b_dec), at<float>(v_b_dec)}, d);
    const auto first = std::find_if(bad.begin(), bad.end(), [](int64_t g) { return g >= 0; });
    return first == bad.end() ? -1 : *first;
}

}  // namespace microtome::cpu
