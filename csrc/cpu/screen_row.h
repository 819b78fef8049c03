// temporary stand-in while developing
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
namespace microtome::cpu {
namespace {
void screen_row(const float* w, int64_t d, int64_t stride, int kind, int16_t* shadow, float* stats) {
    double n = 0, e = 0; float mx = 0;
    for (int64_t i = 0; i < d; ++i) { n += double(w[i]) * w[i]; mx = std::fabs(w[i]) > mx ? std::fabs(w[i]) : mx; }
    n = std::sqrt(n);
    float s = 1;
    if (kind == 1) { double t = mx / 32767.0, u = n / (46340.0 - std::sqrt(double(d))); s = float((t > u ? t : u) * (1 + 1e-6)); if (!(s > 0)) s = 1; }
    for (int64_t i = 0; i < d; ++i) {
        double r;
        if (kind == 1) { float q = std::nearbyintf(w[i] / s); shadow[i] = int16_t(q); r = double(w[i]) - double(shadow[i]) * s; }
        else { uint32_t u; std::memcpy(&u, w + i, 4); u += 0x7fff + ((u >> 16) & 1); shadow[i] = int16_t(u >> 16); u &= 0xffff0000u; float b; std::memcpy(&b, &u, 4); r = double(w[i]) - b; }
        e += r * r;
    }
    for (int64_t i = d; i < stride; ++i) shadow[i] = 0;
    stats[0] = s; stats[1] = float(n * (1 + 1e-6)); stats[2] = float(std::sqrt(e) * (1 + 1e-6)); stats[3] = 0;
}
}
}
