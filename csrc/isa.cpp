#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace nncx {
namespace {

std::atomic<Isa> active{Isa::scalar};

std::string supported_names() {
  std::string names;
  for (Isa isa : kIsas) {
    if (isa_supported(isa)) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  return names;
}

Isa parse(std::string_view name, std::string_view source) {
  for (Isa isa : kIsas) {
    if (isa_name(isa) == name && isa_supported(isa)) return isa;
  }
  throw std::runtime_error(std::string(source) +
                           " must be a path that was built and that this CPU has (" +
                           supported_names() + "), got '" + std::string(name) + "'");
}

}  // namespace

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  return "";
}

bool isa_built(Isa isa) {
#ifdef NNCX_BUILT_X86
  return true;
#endif
  return isa == Isa::scalar;
}

bool isa_supported(Isa isa) {
#ifdef NNCX_BUILT_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) {  // what Ice Lake and Zen 4 have; a lesser AVX-512 takes avx2
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return isa == Isa::scalar;
}

Isa active_isa() { return active.load(std::memory_order_relaxed); }

void set_isa(std::string_view name) { active = parse(name, "isa"); }

void choose_isa() {
  const char* forced = std::getenv("NNCX_ISA");
  if (forced && *forced) {
    active = parse(forced, "NNCX_ISA");
    return;
  }
  for (Isa isa : kIsas) {
    if (isa_supported(isa)) active = isa;
  }
}

}  // namespace nncx
