// Instruction-set levels, chosen at run time: generic < avx2 < avx512 < avx512bf16 < amx.
#pragma once

namespace microtome {

enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// The best level this processor and operating system allow. AMX asks Linux for permission once.
Isa best_isa();

// Whether level amx runs on csrc/emulator/amx.h here: in a build with MICROTOME_EMULATE_AMX, on a processor whose best
// level is avx512bf16. Tests demand it by its name; it is never the best level.
bool amx_is_emulated();

// The highest level that may be demanded: the best one, or amx where it is emulated.
Isa highest_isa();

// The level named by `forced` ("" for the best), never above the highest.
Isa isa_from_name(const char* forced);

const char* isa_name(Isa isa);

}  // namespace microtome
