// One bind line per op. Tensors come in as addresses, sizes and strides; nothing here owns memory.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "common/isa.h"
#include "cpu/attribution_scores.h"
#include "cpu/pack_weights.h"
#include "cpu/packed_linear.h"
#include "cpu/sae_loss.h"
#include "cpu/sae_update.h"
#include "cpu/screen_weights.h"
#include "cpu/sparse_decode.h"
#include "cpu/topk_encode.h"

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

}  // namespace

PYBIND11_MODULE(_native_ext, m) {
    const auto nogil = py::call_guard<py::gil_scoped_release>();
    m.def("isa_level", [](const std::string& forced) { return isa_name(isa_from_name(forced.c_str())); });
    m.def("screen_kind", [](const std::string& forced) { return cpu::screen_kind(isa_from_name(forced.c_str())); });
    m.def("has_cuda", [] {
#if defined(MICROTOME_CUDA)
        return true;
#else
        return false;
#endif
    });
    m.def("attribution_scores", &cpu::attribution_scores, nogil);
    m.def("sae_update", &cpu::sae_update, nogil);
    m.def("screen_weights", &cpu::screen_weights, nogil);
    m.def("topk_encode", &bind_topk_encode, nogil);
    m.def("sparse_decode", &cpu::sparse_decode, nogil);
    m.def("sparse_decode_grad_values", &cpu::sparse_decode_grad_values, nogil);
    m.def("sparse_decode_grad_W_dec", &cpu::sparse_decode_grad_W_dec, nogil);
    m.def("pack_weights", &cpu::pack_weights, nogil);
    m.def("packed_linear", &cpu::packed_linear, nogil);
    m.def("sae_loss", &cpu::sae_loss, nogil);
}
