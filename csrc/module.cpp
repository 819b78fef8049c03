// One bind line per op. Tensors come in as addresses, sizes and strides; nothing here owns memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "common/pages.h"
#include "cpu/attribution_scores.h"
#include "cpu/cascade_attention.h"
#include "cpu/coalition_gram.h"
#include "cpu/coalition_inputs.h"
#include "cpu/delta_linear.h"
#include "cpu/mlp_shapley.h"
#include "cpu/pack_weights.h"
#include "cpu/packed_linear.h"
#include "cpu/patch_rows.h"
#include "cpu/sae_loss.h"
#include "cpu/sae_update.h"
#include "cpu/screen_weights.h"
#include "cpu/shapley_reduce.h"
#include "cpu/sparse_decode.h"
#include "cpu/topk_encode.h"
#if defined(MICROTOME_CUDA)
#include "cuda/bindings.h"
#endif

namespace py = pybind11;
using namespace microtome;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address a) {
    return reinterpret_cast<T*>(a);
}

std::pair<int64_t, int64_t> bind_topk_encode(Address x, int64_t x_stride, Address weights, Address bias, Address center,
                                             int64_t n, int64_t d, int64_t f, int64_t k, bool fast, Address shadow,
                                             Address stats, int64_t stride, Address values, Address indices,
                                             Address candidates, const std::string& forced, int threads) {
    int64_t bad_row = -1, bad_feature = -1;
    cpu::topk_encode(
        {at<const float>(x), x_stride, at<const float>(weights), at<const float>(bias), at<const float>(center), n, d,
         f, k, fast, at<const int16_t>(shadow), at<const float>(stats), stride, at<float>(values), at<int32_t>(indices),
         at<int32_t>(candidates), &bad_row, &bad_feature, threads},
        isa_from_name(forced.c_str()));
    return {bad_row, bad_feature};
}

std::pair<int64_t, int64_t> bind_patch_rows(Address base, int64_t example, int64_t token, Address sources,
                                            int64_t source, Address rows, Address table, Address factors,
                                            const std::array<int64_t, 8>& sizes, Address out, int threads) {
    const auto [total, n, m, b, t, w, S, w_s] = sizes;
    return cpu::patch_rows(
        {at<const float>(base), example, token, at<const float>(sources), source, at<const int32_t>(rows),
         at<const int32_t>(table), at<const float>(factors), total, n, m, b, t, w, S, w_s, at<float>(out)},
        threads);
}

std::pair<int64_t, int64_t> bind_coalition_inputs(Address x, int64_t x_stride, Address background,
                                                  int64_t background_stride, Address ranks, Address rows,
                                                  Address player, int64_t e, int64_t n, int64_t q, int64_t p, int64_t m,
                                                  int64_t R, int64_t size, Address out, const std::string& isa,
                                                  int threads) {
    return cpu::coalition_inputs(
        {at<const void>(x), x_stride, at<const void>(background), background_stride, at<const int32_t>(ranks),
         at<const int32_t>(rows), at<const int32_t>(player), e, n, q, p, m, at<void>(out)},
        R, size, isa, threads);
}

// Address and strides of example, token and head.
using View = std::array<int64_t, 4>;

cpu::Heads heads(const View& view) {
    return {at<const float>(static_cast<Address>(view[0])), view[1], view[2], view[3]};
}

cpu::Problem bind_cascade_attention(const View& q, const View& k, const View& v, const View& k_base, const View& v_base,
                                    Address rows, Address q_positions, Address first,
                                    const std::array<int64_t, 9>& sizes, float scale, float softcap, int64_t window,
                                    Address z, Address lse, const std::string& isa, int threads) {
    const auto [Tq, T, n, b, t, h, hk, dh, dv] = sizes;
    return cpu::cascade_attention({heads(q),
                                   heads(k),
                                   heads(v),
                                   heads(k_base),
                                   heads(v_base),
                                   at<const int32_t>(rows),
                                   at<const int32_t>(q_positions),
                                   at<const int32_t>(first),
                                   Tq,
                                   T,
                                   n,
                                   b,
                                   t,
                                   h,
                                   hk,
                                   dh,
                                   dv,
                                   window,
                                   scale,
                                   softcap,
                                   at<float>(z),
                                   at<float>(lse)},
                                  isa, threads);
}

cpu::Problem bind_swap_key_attention(const View& z, const View& lse, const View& q, const View& k_base,
                                     const View& v_base, const View& q_new, const View& k_new, const View& v_new,
                                     Address rows, Address first, const std::array<int64_t, 8>& sizes, float scale,
                                     float softcap, int64_t window, Address out, const std::string& isa, int threads) {
    const auto [total, n, b, t, h, hk, dh, dv] = sizes;
    return cpu::swap_key_attention({heads(z),
                                    heads(lse),
                                    heads(q),
                                    heads(k_base),
                                    heads(v_base),
                                    heads(q_new),
                                    heads(k_new),
                                    heads(v_new),
                                    at<const int32_t>(rows),
                                    at<const int32_t>(first),
                                    total,
                                    n,
                                    b,
                                    t,
                                    h,
                                    hk,
                                    dh,
                                    dv,
                                    window,
                                    scale,
                                    softcap,
                                    at<float>(out)},
                                   isa, threads);
}

int64_t bind_mlp_shapley(Address x, Address background, Address ranks, const std::array<int64_t, 7>& sizes,
                         const std::vector<std::array<int64_t, 5>>& weights, const std::vector<Address>& biases,
                         const std::vector<int>& activations, Address player, bool paired, bool half, Address mean,
                         Address m2, const std::string& isa, int threads) {
    const auto [e, n, m, S, U, A, p] = sizes;
    std::vector<cpu::MlpWeights> layers;
    for (const auto& [data, o, i, row, column] : weights) {
        layers.push_back({static_cast<Address>(data), o, i, row, column});
    }
    return cpu::mlp_shapley(
        {at<const float>(x), at<const float>(background), at<const int32_t>(ranks), e, n, m, S, U, A, p, layers, biases,
         activations, at<const int32_t>(player), paired, half, at<double>(mean), at<double>(m2)},
        isa, threads);
}

}  // namespace

PYBIND11_MODULE(_native_ext, m) {
    const auto nogil = py::call_guard<py::gil_scoped_release>();
    m.def("isa_level", [](const std::string& forced) { return isa_name(isa_from_name(forced.c_str())); });
    m.def("amx_is_emulated", &amx_is_emulated);
    m.def("screen_kind", [](const std::string& forced) { return cpu::screen_kind(isa_from_name(forced.c_str())); });
    m.def("ask_for_large_pages", &ask_for_large_pages);
#if defined(MICROTOME_CUDA)
    auto on_gpu = m.def_submodule("cuda");
    cuda::bind(on_gpu);
#endif
    m.def("attribution_scores", &cpu::attribution_scores, nogil);
    m.def("cascade_attention", &bind_cascade_attention, nogil);
    m.def("coalition_gram", &cpu::coalition_gram, nogil);
    m.def("coalition_inputs", &bind_coalition_inputs, nogil);
    m.def("mlp_shapley", &bind_mlp_shapley, nogil);
    m.def("patch_rows", &bind_patch_rows, nogil);
    m.def("swap_key_attention", &bind_swap_key_attention, nogil);
    m.def("sae_update", &cpu::sae_update, nogil);
    m.def("screen_weights", &cpu::screen_weights, nogil);
    m.def("shapley_reduce", &cpu::shapley_reduce, nogil);
    m.def("topk_encode", &bind_topk_encode, nogil);
    m.def("sparse_decode", &cpu::sparse_decode, nogil);
    m.def("sparse_decode_grad_values", &cpu::sparse_decode_grad_values, nogil);
    m.def("sparse_decode_grad_W_dec", &cpu::sparse_decode_grad_W_dec, nogil);
    m.def("pack_weights", &cpu::pack_weights, nogil);
    m.def("delta_linear", &cpu::delta_linear, nogil);
    m.def("packed_linear", &cpu::packed_linear, nogil);
    m.def("sae_loss", &cpu::sae_loss, nogil);
}
