#!/usr/bin/env bash
# Usage: requirements/install.sh VENV
# Make or complete a virtual environment with the pinned packages of cpu.txt and this project.
set -euo pipefail

venv=$1
cd "$(dirname "$0")/.."
pins=requirements/cpu.txt
torch_index=https://download.pytorch.org/whl/cpu

say() { echo "[setup] $*"; }
fail() { echo "[setup] $*" >&2; exit 1; }

# The first Python that runs, is new enough and can make virtual environments; 3.11 is what the pins were tried with.
find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# Quiet but for errors: some pip configurations print thousands of warnings.
pip_install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-deps "$@"; }

[ "$(uname -sm)" = "Linux x86_64" ] ||
    fail "the pinned packages are for Linux x86_64, this is $(uname -sm): install with pip instead, see README.md"

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) ||
        fail "no Python >= 3.11 with the venv module found: install python3.11 and python3.11-venv, or set PYTHON=/path/to/python3.11"
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi

say "installing $(grep -c == "$pins") pinned packages, 4 GB on disk, no CUDA: three to five minutes the first time"
started=$SECONDS
pin() { grep "^$1==" "$pins"; }
# torch comes first and alone: its CPU build is either in pip's own sources or in PyTorch's CPU index.
if ! pip_install "$(pin setuptools)" "$(pin torch)" 2>/dev/null; then
    say "pip's own sources lack $(pin torch): trying PyTorch's CPU index"
    pip_install "$(pin setuptools)"
    pip_install --index-url "$torch_index" "$(pin torch)" ||
        fail "cannot install $(pin torch), neither from pip's own sources nor from $torch_index"
fi
# No build isolation: the few source packages, and this project, build with the setuptools above.
pip_install --no-build-isolation -r "$pins"
pip_install --no-build-isolation --editable .
say "ready after $((SECONDS - started)) s"
