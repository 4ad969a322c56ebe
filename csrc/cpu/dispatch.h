// CPU kernels are compiled once per instruction set (see setup.py and CMakeLists.txt): each build defines
// CPU_CAPABILITY, PyTorch's own name for it, and lives in the namespace of that name. setup.py compiles each
// build as one file: in there each family has a namespace for what is its own.
#pragma once

#include <ATen/Version.h>

#if defined(__x86_64__) || defined(_M_X64)
#define GRADNORM_DECLARE_KERNELS(Table, table) \
  namespace DEFAULT {                          \
  extern const Table table;                    \
  }                                            \
  namespace AVX2 {                             \
  extern const Table table;                    \
  }                                            \
  namespace AVX512 {                           \
  extern const Table table;                    \
  }
#define GRADNORM_KERNELS(table) ::gradnorm_kernels::for_this_cpu(DEFAULT::table, AVX2::table, AVX512::table)
#else
#define GRADNORM_DECLARE_KERNELS(Table, table) \
  namespace DEFAULT {                          \
  extern const Table table;                    \
  }
#define GRADNORM_KERNELS(table) (DEFAULT::table)
#endif

namespace gradnorm_kernels {

// The instruction set PyTorch chose for its own kernels, which ATEN_CPU_CAPABILITY can lower.
template <class Table>
const Table& for_this_cpu(const Table& base, const Table& avx2, const Table& avx512) {
  enum Capability { kDefault, kAvx2, kAvx512 };
  static const Capability capability = [] {
    const std::string name = at::get_cpu_capability();
    return name == "AVX512" ? kAvx512 : name == "AVX2" ? kAvx2 : kDefault;
  }();
  return capability == kAvx512 ? avx512 : capability == kAvx2 ? avx2 : base;
}

}  // namespace gradnorm_kernels
