// One bind line per op. Tensors come in as addresses, sizes and strides; nothing here owns memory.
#include <pybind11/pybind11.h>

#include <string>

#include "common/isa.h"
#include "cpu/sae_update.h"
#include "cpu/screen_weights.h"

namespace py = pybind11;
using namespace microtome;

PYBIND11_MODULE(_native_ext, m) {
    m.def("isa_level", [](const std::string& forced) { return isa_name(isa_from_name(forced.c_str())); });
    m.def("sae_update", &cpu::sae_update, py::call_guard<py::gil_scoped_release>());
    m.def("screen_weights", &cpu::screen_weights, py::call_guard<py::gil_scoped_release>());
    m.def("has_cuda", [] {
#if defined(MICROTOME_CUDA)
        return true;
#else
        return false;
#endif
    });
}
