// The CUDA ops as a Python module: `microtome._native_ext.cuda` on the GPU, `microtome._emulated_ext` without one.
#pragma once

#include <pybind11/pybind11.h>

#include "cuda/shapley_reduce.h"
#include "cuda/topk_encode.h"

namespace microtome::cuda {

inline void bind(pybind11::module_& m) {
    const auto nogil = pybind11::call_guard<pybind11::gil_scoped_release>();
    m.def("shapley_reduce", &shapley_reduce, nogil);
    m.def("topk_encode_filter", &topk_encode_filter, nogil);
    m.def("topk_encode_sample", &topk_encode_sample, nogil);
}

}  // namespace microtome::cuda
