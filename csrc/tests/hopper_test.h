// The tests of csrc/emulator/hopper.h, run from Python by way of the emulated extension.
#pragma once

#include <string>
#include <vector>

#define EACH_HOPPER_TEST(X)                                  \
    X(a_barrier_waits_for_threads_and_for_bytes)             \
    X(a_tensor_copy_swizzles_and_fills_with_zeros)           \
    X(a_product_reads_through_its_descriptors)               \
    X(a_product_undoes_every_swizzle)                        \
    X(products_accumulate_and_must_be_fenced_and_waited_for) \
    X(registers_move_between_warpgroups)

namespace microtome::test {

#define DECLARE(name) void name();
EACH_HOPPER_TEST(DECLARE)
#undef DECLARE

// The names of those that fail.
std::vector<std::string> run_hopper_tests();

}  // namespace microtome::test
