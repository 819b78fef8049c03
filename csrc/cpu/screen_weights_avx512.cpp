#include "cpu/screen_weights_kernel.h"

namespace microtome::cpu {
const ScreenRows kScreenRowsAvx512 = screen_rows;
}
