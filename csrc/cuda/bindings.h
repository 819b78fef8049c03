// The CUDA ops as a Python module: `microtome._native_ext.cuda` on the GPU, `microtome._emulated_ext` without one.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "cuda/coalition_inputs.h"
#include "cuda/device.h"
#include "cuda/random_ranks.h"
#include "cuda/sae_update.h"
#include "cuda/shapley_reduce.h"
#include "cuda/topk_encode.h"
#include "cuda/topk_select.h"

namespace microtome::cuda {

// values, grad_values, grad_out of a code, k and its scale.
using CodeArguments = std::pair<std::array<uintptr_t, 4>, float>;

inline Code code_of(const CodeArguments& given) {
    const auto& [values, grad_values, grad_out, k] = given.first;
    return {values, grad_values, grad_out, static_cast<int64_t>(k), given.second};
}

// The arguments come in the order of the structures in sae_update.h.
inline void bind_sae_update(const std::array<uintptr_t, 12>& entries, const std::array<int64_t, 4>& sizes,
                            const CodeArguments& code, const CodeArguments& aux, uintptr_t x,
                            const std::array<bool, 3>& kinds, const std::array<float, 9>& numbers,
                            const std::array<uintptr_t, 12>& states, const std::array<uintptr_t, 3>& screen,
                            const std::array<uintptr_t, 2>& copies, uintptr_t centre, uintptr_t verdict,
                            const std::array<bool, 4>& options, uintptr_t stream) {
    const auto& a = entries;
    const auto& s = states;
    const Entries e{a[0], a[1],  a[2],  a[3],     a[4],     a[5],     a[6],     a[7],      a[8],
                    a[9], a[10], a[11], sizes[0], sizes[1], sizes[2], sizes[3], options[3]};
    const auto& r = numbers;
    const Rule rule{kinds[0], kinds[1], kinds[2], r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]};
    const Update update{{s[0], s[1], s[2]},
                        {s[3], s[4], s[5]},
                        {s[6], s[7], s[8]},
                        {s[9], s[10], s[11]},
                        screen[0],
                        screen[1],
                        static_cast<int64_t>(screen[2]),
                        copies[0],
                        copies[1],
                        centre,
                        verdict,
                        options[0],
                        options[1],
                        options[2]};
    sort_entries(e, code_of(code), code_of(aux), x, stream);
    sae_update(e, code_of(code), code_of(aux), x, rule, update, stream);
}

inline void bind(pybind11::module_& m) {
    const auto nogil = pybind11::call_guard<pybind11::gil_scoped_release>();
    m.def("candidate_values", &candidate_values, nogil);
    m.def("compiled_for_device", &compiled_for_device, nogil);
    m.def("coalition_inputs", &coalition_inputs, nogil);
    m.def("random_ranks", &random_ranks, nogil);
    m.def("sae_update", &bind_sae_update, nogil);
    m.def("select_candidates", &select_candidates, nogil);
    m.def("shapley_reduce", &shapley_reduce, nogil);
    m.def("topk_encode_filter", &topk_encode_filter, nogil);
    m.def("topk_encode_sample", &topk_encode_sample, nogil);
    m.def("update_programs", &update_programs);
}

}  // namespace microtome::cuda
