// AVX-512 F, BW, DQ, VL and VNNI; compiled with these, empty elsewhere. For plain weights BF16's own
// dot product is not used: it sums in another order, and reading them is what takes the time.
#include "weight.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__) && defined(__AVX512DQ__)
#include "vectors_avx512.h"

#include "attend.h"
#include "inputs.h"
#include "rows.h"
#include "rows_int8.h"

namespace specmoe {

const Kernels* avx512_kernels_or_null() {
  static const Kernels kernels{"avx512",  any_rows, any_rows_int8, nullptr,
                               put_any, gate_any, round_any,     attend_any};
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vnni");
  return has ? &kernels : nullptr;
}

}  // namespace specmoe

#else

namespace specmoe {
const Kernels* avx512_kernels_or_null() { return nullptr; }
}  // namespace specmoe

#endif
