// Which CPU path this process uses: scalar, avx2, or avx512 (Ice Lake's level: VPOPCNTDQ and VNNI).
//
// A path is a folder of csrc/ (its name is the namespace) compiled with its own flags. Two
// questions are kept apart: was it built, and does this CPU have it. The answer is chosen once, at
// import: the environment variable NNCX_ISA if it is set, else the best path that is both built and
// supported. `set_isa` switches later, for tests; weights prepacked for another path are then
// refused by name.
#pragma once

#include <array>
#include <string_view>

namespace nncx {

enum class Isa { scalar, avx2, avx512 };

inline constexpr std::array kIsas = {Isa::scalar, Isa::avx2, Isa::avx512};  // the best one last

std::string_view isa_name(Isa isa);
bool isa_built(Isa isa);
bool isa_supported(Isa isa);  // built, and this CPU has it

Isa active_isa();
// Both throw std::runtime_error, in one sentence, if `name` is not a supported path.
void set_isa(std::string_view name);
void choose_isa();  // from NNCX_ISA, else the best

}  // namespace nncx

// NNCX_ON_PATH(isa, fn(args)) calls fn of that path.
#ifdef NNCX_BUILT_X86
#define NNCX_ON_PATH(isa, call)                        \
  ((isa) == ::nncx::Isa::avx512 ? ::nncx::avx512::call \
   : (isa) == ::nncx::Isa::avx2 ? ::nncx::avx2::call   \
                                : ::nncx::scalar::call)
#else
#define NNCX_ON_PATH(isa, call) ((void)(isa), ::nncx::scalar::call)
#endif
