#include "cpu/screen_weights_kernel.h"

namespace microtome::cpu {
const ScreenRows kScreenRowsAvx2 = screen_rows;
}
