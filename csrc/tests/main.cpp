// The C++ tests: what Python cannot see, which is every read and write past a buffer (`make sanitize`), and every
// instruction set in one process. The numbers themselves are tested from Python, in tests/ops.
#include "check.h"
#include "tests/hopper_test.h"

namespace microtome::test {

#define EACH_TEST(X)                                              \
    X(topk_encode_answers_every_shape_at_every_level)             \
    X(topk_encode_tells_near_ties_apart_at_every_level)           \
    X(topk_encode_computes_overflowing_rows_whole)                \
    X(topk_encode_takes_zeros_of_both_signs_for_one_value)        \
    X(topk_encode_keeps_few_candidates_on_gaussian_rows)          \
    X(topk_encode_names_what_is_not_finite)                       \
    X(decode_and_loss_are_right_at_every_level)                   \
    X(the_update_agrees_between_levels_and_threads)               \
    X(the_screen_bounds_its_error_at_every_level)                 \
    X(products_with_panels_are_right_at_every_level)              \
    X(a_base_row_that_is_not_there_leaves_the_output_alone)       \
    X(vector_functions_are_within_their_bounds)                   \
    X(attention_reads_the_right_keys_at_every_level)              \
    X(one_swapped_key_answers_as_a_whole_run_at_every_level)      \
    X(patches_land_where_the_table_says)                          \
    X(attribution_scores_are_right_at_every_level)                \
    X(coalition_inputs_are_right_at_every_level)                  \
    X(walks_are_reduced_at_every_level)                           \
    X(coalitions_are_summed_at_every_level)                       \
    X(walks_through_a_network_are_right_at_every_level)           \
    X(an_order_that_is_no_permutation_leaves_the_output_alone)    \
    X(what_a_relu_leaves_zero_may_be_left_out_of_a_product)       \
    X(a_barrier_lets_every_thread_see_what_all_wrote)             \
    X(a_missing_barrier_gives_another_answer_under_another_order) \
    X(a_named_barrier_waits_for_its_own_threads_only)             \
    X(lanes_exchange_within_their_mask)                           \
    X(a_lane_outside_its_mask_is_named)                           \
    X(a_block_that_cannot_go_on_is_an_error)                      \
    X(threads_that_returned_are_not_waited_for)                   \
    X(shared_memory_starts_as_nan_in_every_block)                 \
    X(atomics_lose_nothing_and_come_in_any_order)                 \
    X(a_copy_is_not_seen_before_its_group_is_waited_for)          \
    X(an_exception_in_a_kernel_reaches_the_host)                  \
    X(a_geometry_that_no_gpu_has_is_refused)                      \
    X(blocks_beyond_the_limit_of_y_lie_along_x)                   \
    X(cuda_orders_are_permutations)                               \
    X(cuda_candidates_are_valued_and_selected)                    \
    X(cuda_coalitions_are_written)                                \
    X(cuda_walks_are_reduced)                                     \
    X(cuda_steps_move_every_parameter)

#if defined(MICROTOME_X86)
#define EACH_AMX_TEST(X)                          \
    X(tiles_round_and_flush_as_the_manual_says)   \
    X(tiles_multiply_every_row_with_every_column) \
    X(tiles_are_refused_where_the_processor_would)
#else
#define EACH_AMX_TEST(X)
#endif

#define DECLARE(name) void name();
EACH_TEST(DECLARE)
EACH_AMX_TEST(DECLARE)
#undef DECLARE

}  // namespace microtome::test

int main() {
    std::printf("best level: %s%s\n", microtome::isa_name(microtome::best_isa()),
                microtome::amx_is_emulated() ? ", and amx emulated" : "");
#define RUN(name)            \
    std::printf(#name "\n"); \
    std::fflush(stdout);     \
    microtome::test::name();
    using namespace microtome::test;
    EACH_TEST(RUN)
    EACH_AMX_TEST(RUN)
    EACH_HOPPER_TEST(RUN)
    std::printf(failures ? "%d CHECKs failed\n" : "all passed\n", failures);
    return failures != 0;
}
