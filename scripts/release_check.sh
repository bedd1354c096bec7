#!/usr/bin/env bash
# Installs nncx in every supported way, each time into an environment that is thrown away, from a
# clean clone of HEAD, and runs the build's tests against what was installed. Takes about half an
# hour and 25 GB, nearly all of it torch.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=$(command -v "${PYTHON:-python3}")
OLDEST_TORCH=torch==2.10.0
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
git clone --quiet . "$WORK/nncx"
cp -r "$WORK/nncx/tests" "$WORK/tests" # beside the clone, so that the tests import what is installed

step() { printf '\n=== %s\n' "$*"; }

# new_environment NAME: a fresh one, whose pip and python become `pip` and `python` here.
new_environment() {
  "$PYTHON" -m venv "$WORK/$1"
  export PATH="$WORK/$1/bin:$PATH"
  pip install --quiet --upgrade pip
}

# install ARGUMENTS...: from the clone, as a user would.
install() {
  step "pip install $*"
  (cd "$WORK/nncx" && time pip install --quiet "$@")
}

check() {
  python -m pip check
  (cd "$WORK/tests" && python -m pytest --quiet test_build.py -p no:cacheprovider)
}

remove() {
  pip uninstall --quiet --yes nncx
  git -C "$WORK/nncx" clean --quiet -fdx
}

new_environment old-torch
step "torch older than 2.10 is refused by name"
site=$(python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
mkdir "$site/torch" && echo "__version__ = '2.9.1'" > "$site/torch/version.py"
(cd "$WORK/nncx" && pip install . 2>&1 || true) | grep "needs torch >= 2.10, found 2.9.1"

new_environment newest
install .
pip install --quiet pytest
check
remove
install --editable .
check
remove
pip install --quiet setuptools cmake ninja pybind11 build
install --no-build-isolation --no-deps .
check
remove
step "NNCX_CUDA=0"
NNCX_CUDA=0 install .
check
remove

step "sdist, from it a wheel"
(cd "$WORK/nncx" && python -m build --outdir "$WORK/dist")
wheel=$(echo "$WORK"/dist/*.whl)
install "$wheel"
check

# Built against the newest torch, run with the oldest: one binary for all.
new_environment oldest
pip install --quiet "$OLDEST_TORCH" pytest
install "$wheel"
check
remove
install .
check

step "all ways work"
