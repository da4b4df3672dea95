// Every kernel, compiled with the flags that `setup.py` gives this file. All that it includes lies in unnamed namespaces
// and uses no standard templates: the linker would keep one copy of those for all files, perhaps this one's.
#include "simd_portable.h"
#include "vector_math.h"
// The kernels follow their vectors.
#include "linear_kernel.h"
#include "attention_kernel.h"
#include "norm_kernel.h"

#include "kernels.h"

namespace jaxopt {

const Kernels* portable_kernels() {
  static const Kernels kernels = {simd::kName, linear_kernels(), attention_kernels(), norm_kernels()};
  return &kernels;
}

}  // namespace jaxopt
