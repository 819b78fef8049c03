// A caller's network in the layout that the kernels of mlp_shapley read.
#pragma once

#include <vector>

#include "common/buffer.h"
#include "cpu/mlp_shapley.h"

namespace microtome::cpu {

class MlpModel {
  public:
    MlpModel(const MlpShapleyArguments& a, int threads);
    MlpModel(const MlpModel&) = delete;
    MlpModel& operator=(const MlpModel&) = delete;
    const Mlp& operator*() const { return mlp_; }

  private:
    float* take(int64_t floats);  // zeros
    const float* pack(const MlpWeights& W, bool half, int threads);
    const float* bias(const MlpShapleyArguments& a, int64_t layer);
    void sort_columns(const MlpShapleyArguments& a);  // by player, those of one in their own order

    Mlp mlp_;
    std::vector<Buffer> memory_;
    std::vector<MiddleLayer> middle_;
    std::vector<int32_t> column_, begin_;
};

}  // namespace microtome::cpu
