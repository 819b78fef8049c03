// The CUDA ops on the emulator: the same kernels and hosts, over CPU tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cuda/bindings.h"
#include "emulator/simt.h"
#include "tests/hopper_test.h"

PYBIND11_MODULE(_emulated_ext, m) {
    microtome::cuda::bind(m);
    m.def("set_order", [](const std::string& name, uint64_t seed) {
        using microtome::simt::Order;
        const Order order = name == "forward"   ? Order::kForward
                            : name == "reverse" ? Order::kReverse
                                                : Order::kShuffled;
        microtome::simt::set_order(order, seed);
    });
    m.def("set_most_shared", &microtome::simt::set_most_shared);
    m.def("failing_hopper_tests", &microtome::test::run_hopper_tests);
}
