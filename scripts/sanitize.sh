#!/usr/bin/env bash
# Runs tests on native code that is compiled with a sanitizer of gcc; the first error ends the run.
#
#   scripts/sanitize.sh address|thread [arguments for pytest]
#
# address: AddressSanitizer and UndefinedBehaviorSanitizer. Without leaks: Python's own are many.
# thread:  ThreadSanitizer. It sees nncx's code, run by Python's threads and by torch's
#          (csrc/torch/parallel.h), and no access that torch makes itself.
#
# torch and Python are not instrumented; nothing is suppressed. The build has a folder of its own,
# build/sanitize-*, with a copy of the package; it takes some minutes. PYTHON (default: python3)
# needs nncx's extra `test` and the build tools.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=$(realpath --no-symlinks "$(command -v "${PYTHON:-python3}")")
kind=${1:?address or thread}
shift
# Compilers of torch.compile run in processes of their own, which take minutes under a sanitizer.
# torch.distributed has threads of its own, whose locks ThreadSanitizer does not see. The emulator of
# GPUs switches stacks, and is not instrumented.
tests=("$PWD"/tests/{ops,nn} "$PWD"/tests/test_entropy.py
  -k "not compile and not under_wrappers and not data_parallel and not emulated"
  -p no:cacheprovider --capture=sys) # a report goes to stderr past Python
launcher=()
case $kind in
  address)
    fsanitize=address,undefined
    runtimes="libasan.so libubsan.so"
    ;;
  thread)
    fsanitize=thread
    runtimes=libtsan.so
    launcher=(setarch --addr-no-randomize) # its shadow memory wants its place
    ;;
  *)
    echo "sanitize.sh: the sanitizer must be address or thread, got '$kind'" >&2
    exit 2
    ;;
esac

folder=$PWD/build/sanitize-$kind
NNCX_SANITIZE=$fsanitize NNCX_CUDA=0 "$PYTHON" setup.py --quiet build --build-lib "$folder"

# Python loads the runtime too late by itself; libstdc++ is there for its exceptions.
preload=
for library in $runtimes libstdc++.so; do
  preload+="$(gcc -print-file-name="$library") "
done
export PYTHONMALLOC=malloc
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
# ... and of accesses that torch makes through libc it shall not hear either.
export TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1
cd "$folder" # whose nncx is the one that is imported
"${launcher[@]}" env LD_PRELOAD="$preload" "$PYTHON" -m pytest "${tests[@]}" "$@"
