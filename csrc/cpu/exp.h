// exp and log in fp32 without branches, so that loops over them become vectors: within 1 ulp.
// exp is 0 below -87.3 and infinite above 88; log is of a positive, normal number.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../check.h"

namespace pelt_fast {

PELT_FAST_INLINE float exp32(float x) {
  const float clipped = x < -87.3f ? -87.3f : (x > 88.0f ? 88.0f : x);
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const float n = (clipped * 1.44269504f + shifter) - shifter;
  float r = clipped - n * 0.693359375f;  // ln 2 in two parts
  r -= n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;  // Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  const float most = x > 88.0f ? std::numeric_limits<float>::infinity() : p * power;
  return x < -87.3f ? 0.0f : most;
}

PELT_FAST_INLINE float log32(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const int32_t shifted = bits - 0x3F3504F3;  // of sqrt(1/2): the mantissa lies around 1
  const int32_t exponent = shifted >> 23;
  const int32_t mantissa = (shifted & 0x007FFFFF) + 0x3F3504F3;
  float m;
  std::memcpy(&m, &mantissa, sizeof(m));
  const float r = m - 1.0f, n = static_cast<float>(exponent);
  float p = 7.0376836292e-2f;  // Cephes' logf
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const float square = r * r;
  float y = p * r * square + n * -2.12194440e-4f;
  y -= 0.5f * square;
  return r + y + n * 0.693359375f;
}

}  // namespace pelt_fast
