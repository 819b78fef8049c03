// Instruction-set levels, chosen at run time: generic < avx2 < avx512 < avx512bf16 < amx.
#pragma once

namespace microtome {

enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// The best level this processor and operating system allow. AMX asks Linux for permission once.
Isa best_isa();

// The level named by `forced` ("" for the best), never above what the processor has.
Isa isa_from_name(const char* forced);

const char* isa_name(Isa isa);

}  // namespace microtome
