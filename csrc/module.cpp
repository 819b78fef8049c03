// One bind line per op. Tensors come in as addresses, sizes and strides; nothing here owns memory.
#include <pybind11/pybind11.h>

#include <string>

#include "common/isa.h"
#include "cpu/sae_loss.h"
#include "cpu/sparse_decode.h"

namespace py = pybind11;
using namespace microtome;

PYBIND11_MODULE(_native_ext, m) {
    const auto nogil = py::call_guard<py::gil_scoped_release>();
    m.def("isa_level", [](const std::string& forced) { return isa_name(isa_from_name(forced.c_str())); });
    m.def("has_cuda", [] {
#if defined(MICROTOME_CUDA)
        return true;
#else
        return false;
#endif
    });
    m.def("sparse_decode", &cpu::sparse_decode, nogil);
    m.def("sparse_decode_grad_values", &cpu::sparse_decode_grad_values, nogil);
    m.def("sparse_decode_grad_W_dec", &cpu::sparse_decode_grad_W_dec, nogil);
    m.def("sae_loss", &cpu::sae_loss, nogil);
}
