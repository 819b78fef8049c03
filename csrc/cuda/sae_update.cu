// A block per latent: gradients of both its rows in registers, then projection, rule, renorm and the shadow.
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/numbers.cuh"
#include "cuda/rows.cuh"
#include "cuda/sae_update.h"

namespace microtome::cuda {
namespace {

constexpr int kTurnsShared = 64;  // floats of scratch a reduction: two sums of up to 32 warps

template <class Row>
struct Tables {
    const Row *x, *grad_out, *aux_grad_out;
};

// The entries of the latent that its block still has to add: all, or what its full chunks leave over.
struct Rest {
    const float *weight, *grad_weight;  // in shared memory, [kChunk]
    const int32_t* source;
    int entries;
    int begin, chunks;  // of the segment: its first entry, its full chunks
};

// One step of the rule with gradient g; m and v are updated where the rule keeps them.
template <bool kAdam>
__device__ float step(const Rule& rule, float p, float g, float& m, float& v, float decay, float shrink) {
    g = g + decay * p;
    p = p * shrink;
    if constexpr (kAdam) {
        m = m + rule.rest1 * (g - m);
        v = rule.beta2 * v + rule.rest2 * (g * g);
        return p - rule.lr * __fdiv_rn(m, __fsqrt_rn(v) * rule.inverse_root + rule.eps);
    } else {
        if (rule.momentum) g = m = rule.beta1 * m + (rule.sign ? rule.rest1 * g : g);
        if (rule.sign) g = g > 0.0f ? 1.0f : g < 0.0f ? -1.0f : 0.0f;
        return p - rule.lr * g;
    }
}

template <bool kAdam>
__device__ void step_one(const Rule& rule, const State& state, int64_t i, float g) {
    float m = state.m ? at<float>(state.m)[i] : 0.0f, v = state.v ? at<float>(state.v)[i] : 0.0f;
    at<float>(state.p)[i] = step<kAdam>(rule, at<float>(state.p)[i], g, m, v, 0.0f, 1.0f);
    if (state.m) at<float>(state.m)[i] = m;
    if (state.v) at<float>(state.v)[i] = v;
}

// Columns of thread t: 4 (i T + t) and the three after it, i < kItems.
__device__ int column(int i) { return 4 * (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)); }

// The gradient of one row: full chunks first, then the other entries, `kAhead` rows in flight.
template <int kItems, bool kWhole, class Row>
__device__ void gradient(float4 (&g)[kItems], const float* partial, const Rest& rest, const float* weight,
                         const Row* table, const Row* aux, int64_t n, int d) {
    constexpr int kAhead = kItems < 8 ? 8 / kItems : 1;
#pragma unroll
    for (int i = 0; i < kItems; ++i) g[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int c = 0; c < rest.chunks; ++c) {
        const float* const row = partial + (rest.begin + c * kChunk + kChunk - 1) / kChunk * d;
#pragma unroll
        for (int i = 0; i < kItems; ++i) add(g[i], 1.0f, stream4<kWhole>(row, column(i), d));
    }
    for (int first = 0; first < rest.entries; first += kAhead) {
        typename Packed<Row>::Type row[kAhead][kItems];
        float w[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            w[j] = first + j < rest.entries ? weight[first + j] : 0.0f;
            const int64_t from = w[j] != 0.0f ? rest.source[first + j] : 0;
            const Row* const source = from < n ? table + from * d : aux + (from - n) * d;
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
                row[j][i] = w[j] != 0.0f ? load4<kWhole>(source, column(i), d) : Packed<Row>::zero();
            }
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
#pragma unroll
            for (int i = 0; i < kItems; ++i) add(g[i], w[j], row[j][i]);
        }
    }
}

// The rule on four columns; p is read by the caller, m and v here.
template <bool kAdam, bool kWhole>
__device__ void step4(const Rule& rule, const State& state, int64_t row, int column, int d, float4& p,
                      const float4& g) {
    float4 m = make_float4(0.0f, 0.0f, 0.0f, 0.0f), v = m;
    if (kAdam || rule.momentum) m = stream4<kWhole>(at<const float>(state.m) + row, column, d);
    if (kAdam) v = stream4<kWhole>(at<const float>(state.v) + row, column, d);
    p.x = step<kAdam>(rule, p.x, g.x, m.x, v.x, rule.decay, rule.shrink);
    p.y = step<kAdam>(rule, p.y, g.y, m.y, v.y, rule.decay, rule.shrink);
    p.z = step<kAdam>(rule, p.z, g.z, m.z, v.z, rule.decay, rule.shrink);
    p.w = step<kAdam>(rule, p.w, g.w, m.w, v.w, rule.decay, rule.shrink);
    if (kAdam || rule.momentum) store4<kWhole>(at<float>(state.m) + row, column, d, m);
    if (kAdam) store4<kWhole>(at<float>(state.v) + row, column, d, v);
}

// A bound from above on the norm of d numbers whose float32 squares sum to `squares`: the sum is low by a factor of at
// most 1 - (d + 2) 2^-24, and each square that underflowed by at most 2^-126.
__device__ float norm_above(float squares, int d) {
    const float width = static_cast<float>(d);
    return __fsqrt_rn(squares) * (1.0001f + width * 1.2e-7f) + __fsqrt_rn(width) * 1.1e-19f;
}

// Write four columns of the shadow, add to the squares of the row and of what rounding lost.
template <bool kWhole>
__device__ void round4(Bf16* shadow, int column, int d, const float4& p, float (&squares)[2]) {
    const float value[4] = {p.x, p.y, p.z, p.w};
    Bf16 bits[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        bits[c] = to_bf16(value[c]);
        const float lost = value[c] - widen(bits[c]);
        if (column + c < d) {
            squares[0] = __fmaf_rn(value[c], value[c], squares[0]);
            squares[1] = __fmaf_rn(lost, lost, squares[1]);
        }
    }
    store4<kWhole>(shadow, column, d, bits);
}

// Write four columns of a row's copy. NaN stays NaN: the copy stands for the row.
template <bool kWhole>
__device__ void copy4(Bf16* copy, int column, int d, const float4& p) {
    const float value[4] = {p.x, p.y, p.z, p.w};
    Bf16 bits[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) bits[c] = value[c] != value[c] ? Bf16{0x7FC0} : to_bf16(value[c]);
    store4<kWhole>(copy, column, d, bits);
}

template <int kItems, bool kWhole, bool kAdam, class Row>
__device__ void update_encoder(const Entries& e, const Tables<Row>& tables, const Rule& rule, const Update& u,
                               const Rest& rest, int64_t latent, float* scratch) {
    const int d = static_cast<int>(e.d);
    float4 g[kItems];
    gradient<kItems, kWhole>(g, at<const float>(e.enc_partial), rest, rest.grad_weight, tables.x, tables.x, e.n, d);
    float squares[2] = {0.0f, 0.0f};
    float* const weights = at<float>(u.W_enc.p) + latent * e.d;
    Bf16* const shadow = at<Bf16>(u.shadow) + latent * u.stride;
    Bf16* const copy = at<Bf16>(u.W_enc_bf16) + latent * e.d;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        float4 p = stream4<kWhole>(weights, column(i), d);
        step4<kAdam, kWhole>(rule, u.W_enc, latent * e.d, column(i), d, p, g[i]);
        store4<kWhole>(weights, column(i), d, p);
        if (u.shadow) round4<kWhole>(shadow, column(i), d, p, squares);
        if (u.W_enc_bf16) copy4<kWhole>(copy, column(i), d, p);
    }
    if (u.shadow) {
        block_sum(squares, scratch);
        if (threadIdx.x == 0) {
            at<float>(u.stats)[4 * latent + 1] = norm_above(squares[0], d);
            at<float>(u.stats)[4 * latent + 2] = norm_above(squares[1], d);
        }
    }
}

template <int kItems, bool kWhole, bool kAdam, class Row>
__device__ void update_decoder(const Entries& e, const Tables<Row>& tables, const Rule& rule, const Update& u,
                               const Rest& rest, int64_t latent, float* scratch) {
    const int d = static_cast<int>(e.d);
    float4 g[kItems], p[kItems];
    float* const weights = at<float>(u.W_dec.p) + latent * e.d;
    gradient<kItems, kWhole>(g, at<const float>(e.dec_partial), rest, rest.weight, tables.grad_out, tables.aux_grad_out,
                             e.n, d);
#pragma unroll
    for (int i = 0; i < kItems; ++i) p[i] = stream4<kWhole>(weights, column(i), d);
    if (u.project) {
        float sums[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            sums[0] = dot(g[i], p[i], sums[0]);
            sums[1] = dot(p[i], p[i], sums[1]);
        }
        block_sum(sums, scratch);
        const float along = -__fdiv_rn(sums[0], sums[1] > 1e-30f ? sums[1] : 1e-30f);
#pragma unroll
        for (int i = 0; i < kItems; ++i) add(g[i], along, p[i]);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) step4<kAdam, kWhole>(rule, u.W_dec, latent * e.d, column(i), d, p[i], g[i]);
    if (u.renorm) {
        float squares[1] = {0.0f};
#pragma unroll
        for (int i = 0; i < kItems; ++i) squares[0] = dot(p[i], p[i], squares[0]);
        block_sum(squares, scratch + kTurnsShared);
        const float length = __fsqrt_rn(squares[0]), divisor = length > 1e-30f ? length : 1e-30f;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            p[i] = make_float4(__fdiv_rn(p[i].x, divisor), __fdiv_rn(p[i].y, divisor), __fdiv_rn(p[i].z, divisor),
                               __fdiv_rn(p[i].w, divisor));
        }
    }
    Bf16* const copy = at<Bf16>(u.W_dec_bf16) + latent * e.d;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        store4<kWhole>(weights, column(i), d, p[i]);
        if (u.W_dec_bf16) copy4<kWhole>(copy, column(i), d, p[i]);
    }
}

// Whether the verdict is there and forbids to write.
__device__ bool is_refused(uintptr_t verdict) { return verdict && *at<const float>(verdict) != 0.0f; }

// Threads of a block at most, and blocks that share an SM at least: what keeps the registers of each tile from
// spilling.
template <int kItems, bool kWhole>
struct Bounds {
    static constexpr int kThreads = kItems == 8 || (kItems == 4 && !kWhole) ? 512 : 256;
    static constexpr int kBlocks = kThreads == 512 ? 1 : kItems == 4 ? 2 : kWhole ? 4 : 3;
};

template <int kItems, bool kWhole, bool kAdam, class Row>
__global__ void __launch_bounds__(Bounds<kItems, kWhole>::kThreads, Bounds<kItems, kWhole>::kBlocks)
    update_kernel(Entries e, Tables<Row> tables, Rule rule, Update u, int turns) {
    MICROTOME_DYNAMIC_SHARED(float4, centre);  // [kItems T], this thread's share of b_dec's gradient
    MICROTOME_SHARED(float, weight, kChunk);
    MICROTOME_SHARED(float, grad_weight, kChunk);
    MICROTOME_SHARED(int32_t, source, kChunk);
    MICROTOME_SHARED(float, scratch, 3 * kTurnsShared);
    const int d = static_cast<int>(e.d), threads = static_cast<int>(blockDim.x), me = static_cast<int>(threadIdx.x);
    if (is_refused(u.verdict)) return;
    if (u.centre) {
        for (int i = 0; i < kItems; ++i) centre[i * threads + me] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    for (int turn = 0; turn < turns; ++turn) {
        const int64_t latent = static_cast<int64_t>(blockIdx.x) * turns + turn;
        if (latent >= e.f) break;
        const float bias_grad = at<const float>(e.bias_grad)[latent];
        if (u.centre && bias_grad != 0.0f) {
            const float* const weights = at<const float>(u.W_enc.p) + latent * e.d;
            for (int i = 0; i < kItems; ++i) {
                add(centre[i * threads + me], bias_grad, load4<kWhole>(weights, column(i), d));
            }
        }
        if (u.rowsparse && at<const int32_t>(e.touched)[latent] == 0) continue;
        const int begin = at<const int32_t>(e.offsets)[latent], end = at<const int32_t>(e.offsets)[latent + 1];
        const int chunks = end - begin > kChunk ? (end - begin) / static_cast<int>(kChunk) : 0;
        const int first = begin + chunks * static_cast<int>(kChunk);
        __syncthreads();  // the last latent's entries and sums have been read
        for (int i = me; i < end - first; i += threads) {
            weight[i] = at<const float>(e.weight)[first + i];
            grad_weight[i] = at<const float>(e.grad_weight)[first + i];
            source[i] = at<const int32_t>(e.source)[first + i];
        }
        __syncthreads();
        const Rest rest{weight, grad_weight, source, end - first, begin, chunks};
        update_encoder<kItems, kWhole, kAdam>(e, tables, rule, u, rest, latent, scratch);
        update_decoder<kItems, kWhole, kAdam>(e, tables, rule, u, rest, latent, scratch + kTurnsShared);
        if (me == 0) step_one<kAdam>(rule, u.b_enc, latent, bias_grad);
    }
    if (u.centre) {
        float* const row = at<float>(u.centre) + static_cast<int64_t>(blockIdx.x) * e.d;
        for (int i = 0; i < kItems; ++i) store4<kWhole>(row, column(i), d, centre[i * threads + me]);
    }
}

// 32 columns of b_dec: rows of grad_out and of `centre` in 32 strands, strands as a tree.
template <class Row>
__global__ void __launch_bounds__(1024)
    bias_kernel(const Row* grad_out, const float* centre, float scale, int64_t n, int64_t programs, int64_t d,
                Rule rule, State b_dec, uintptr_t verdict) {
    MICROTOME_SHARED(float, strands, 32 * 33);
    const int lane = static_cast<int>(threadIdx.x), strand = static_cast<int>(threadIdx.y);
    const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
    if (is_refused(verdict)) return;
    float sum = 0.0f, before = 0.0f;
    if (column < d) {
#pragma unroll 8
        for (int64_t row = strand; row < n; row += 32) sum += widen(grad_out[row * d + column]);
#pragma unroll 8
        for (int64_t row = strand; row < programs; row += 32) before += centre[row * d + column];
    }
    strands[strand * 33 + lane] = scale * sum - before;
    __syncthreads();
    const float total = warp_sum(strands[lane * 33 + strand]);  // of column `strand`
    const int64_t mine = static_cast<int64_t>(blockIdx.x) * 32 + strand;
    if (lane != 0 || mine >= d) return;
    if (rule.adam) {
        step_one<true>(rule, b_dec, mine, total);
    } else {
        step_one<false>(rule, b_dec, mine, total);
    }
}

int64_t turns_of(int64_t f) { return std::max<int64_t>((f + kPrograms - 1) / kPrograms, 1); }

template <class Row, int kItems, bool kWhole>
void run(const Entries& e, const Tables<Row>& tables, const Rule& rule, const Update& u, uintptr_t stream) {
    const int64_t across = (e.d + 4 * kItems - 1) / (4 * kItems), threads = (across + 31) / 32 * 32;
    const Geometry geometry{dim3(static_cast<unsigned>(update_programs(e.f))), dim3(static_cast<unsigned>(threads)),
                            u.centre ? static_cast<size_t>(threads) * kItems * sizeof(float4) : 0, stream};
    launch("sae_update",
           rule.adam ? update_kernel<kItems, kWhole, true, Row> : update_kernel<kItems, kWhole, false, Row>, geometry,
           e, tables, rule, u, turns_of(e.f));
}

template <class Row>
bool is_whole(const Entries& e, const Tables<Row>& t, const Update& u) {
    bool whole = e.d % 4 == 0;
    const Row* const rows[] = {t.x, t.grad_out, t.aux_grad_out};
    for (const Row* table : rows) {
        whole = whole && reinterpret_cast<uintptr_t>(table) % 16 == 0;
    }
    for (const State* s : {&u.W_enc, &u.W_dec}) {
        for (uintptr_t address : {s->p, s->m, s->v}) whole = whole && address % 16 == 0;
    }
    for (uintptr_t address : {e.enc_partial, e.dec_partial, u.centre, u.shadow, u.W_enc_bf16, u.W_dec_bf16}) {
        whole = whole && address % 16 == 0;
    }
    return whole && u.stride % 4 == 0;
}

template <class Row>
void update_rows(const Entries& e, const Code& code, const Code& aux, uintptr_t x, const Rule& rule, const Update& u,
                 uintptr_t stream) {
    const Tables<Row> tables{at<const Row>(x), at<const Row>(code.grad_out), at<const Row>(aux.grad_out)};
    const bool whole = is_whole(e, tables, u);
    if (e.d > (whole ? kWidestUpdate : kWidestOdd)) throw std::runtime_error("sae_update: d is too large");
    if (whole) {
        (e.d <= 1024   ? run<Row, 1, true>
         : e.d <= 2048 ? run<Row, 2, true>
         : e.d <= 4096 ? run<Row, 4, true>
                       : run<Row, 8, true>)(e, tables, rule, u, stream);
    } else {
        (e.d <= 2048 ? run<Row, 2, false> : run<Row, 4, false>)(e, tables, rule, u, stream);
    }
    const Geometry geometry{dim3(static_cast<unsigned>((e.d + 31) / 32)), dim3(32, 32), 0, stream};
    launch("sae_update: b_dec", bias_kernel<Row>, geometry, tables.grad_out, at<const float>(u.centre), code.scale, e.n,
           u.centre ? update_programs(e.f) : 0, e.d, rule, u.b_dec, u.verdict);
}

}  // namespace

int64_t update_programs(int64_t f) { return (f + turns_of(f) - 1) / turns_of(f); }

void sae_update(const Entries& e, const Code& code, const Code& aux, uintptr_t x, const Rule& rule, const Update& u,
                uintptr_t stream) {
    (e.narrow ? update_rows<Bf16> : update_rows<float>)(e, code, aux, x, rule, u, stream);
}

}  // namespace microtome::cuda
