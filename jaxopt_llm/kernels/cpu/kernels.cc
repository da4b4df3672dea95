#include "kernels.h"

#include <atomic>
#include <cstring>

#include "pool.h"

namespace jaxopt {
namespace {

std::atomic<const Kernels*> chosen{nullptr};

constexpr int kCount = 4;

const Kernels* supported(int index) {
#if defined(__x86_64__)
  if (index < 2) {
    const bool runs = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return !runs ? nullptr : index == 0 ? amx_kernels() : avx512_kernels();
  }
  if (index == 2) {
    const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    return runs ? avx2_kernels() : nullptr;
  }
#endif
  return index == 3 ? portable_kernels() : nullptr;
}

}  // namespace

const Kernels& kernels() {
  const Kernels* current = chosen.load(std::memory_order_acquire);
  for (int index = 0; current == nullptr; ++index) current = supported(index);
  chosen.store(current, std::memory_order_release);
  return *current;
}

}  // namespace jaxopt

// Called through ctypes.
extern "C" {

// The name of the index-th instruction set that this machine can run, fastest first; null beyond the last.
const char* jaxopt_isa(int index) {
  for (int i = 0; i < jaxopt::kCount; ++i) {
    const jaxopt::Kernels* kernels = jaxopt::supported(i);
    if (kernels != nullptr && index-- == 0) return kernels->name;
  }
  return nullptr;
}

const char* jaxopt_current_isa() { return jaxopt::kernels().name; }

void jaxopt_use_isa(const char* name) {
  for (int i = 0; i < jaxopt::kCount; ++i) {
    const jaxopt::Kernels* kernels = jaxopt::supported(i);
    if (kernels != nullptr && std::strcmp(kernels->name, name) == 0) jaxopt::chosen.store(kernels);
  }
}

int jaxopt_threads() { return jaxopt::num_threads(); }

void jaxopt_use_threads(int count) { jaxopt::set_num_threads(count); }
}
