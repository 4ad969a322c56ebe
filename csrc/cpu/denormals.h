// Weights of what a mask excludes, such as exp(-100), are below the smallest normal number, with which some
// processors compute a hundred times more slowly.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace gradnorm_kernels::CPU_CAPABILITY {

// Denormal numbers count as 0 in this thread for as long as it lives.
class FlushDenormals {
 public:
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
#if defined(__x86_64__) || defined(_M_X64)
  FlushDenormals() : before_(_mm_getcsr()) {
    constexpr unsigned flush_to_zero = 0x8000, denormals_are_zero = 0x0040;
    _mm_setcsr(before_ | flush_to_zero | denormals_are_zero);
  }
  ~FlushDenormals() {
    _mm_setcsr(before_);
  }

 private:
  unsigned before_;
#else
  FlushDenormals() {}
#endif
};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
