// For loops and functions whose arrays are to live in registers.
#pragma once

#if defined(__clang__)
#define JAXOPT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define JAXOPT_UNROLL _Pragma("GCC unroll 16")
#endif

#define JAXOPT_INLINE inline __attribute__((always_inline))
