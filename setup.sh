#!/usr/bin/env bash
# Makes .venv with all that `make demo` and `make test` need: ./setup.sh
#
# Run it again whenever you like: when nothing has changed it is done at once, and after an interruption it goes on.
#   PYTHON=python3.12 ./setup.sh       builds .venv with that Python
#   TORCH_INDEX_URL=URL ./setup.sh     takes torch, and only torch, from that package index
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=.venv
STAMP=$VENV/.dugnad-setup

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
install() { "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }

# With the folder's place in it: an editable install points there, and so breaks when the folder moves.
wanted() { { cat pyproject.toml setup.sh; pwd; } | cksum; }

python_fits() {
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$VENV/bin/python")" ]
}

make_venv() {
    local python=${PYTHON:-python3} version
    version=$(version_of "$python" 2>/dev/null) || die "$python does not run. Install Python 3.11 to 3.14, or name one: PYTHON=python3.12 ./setup.sh"
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' ||
        die "$python is Python $version; Dugnad needs 3.11 to 3.14. Name another: PYTHON=python3.12 ./setup.sh"
    say "making $VENV with Python $version"
    rm -f "$STAMP"
    "$python" -m venv --clear "$VENV" ||
        die "$python could not make $VENV. On Debian and Ubuntu: apt install python3-venv"
}

# Without an NVIDIA GPU the exact version lets pip take a CPU build where one is at hand, instead of gigabytes of CUDA.
torch_to_install() {
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        echo 'torch>=2.6'
    else
        echo 'torch==2.13.0'
    fi
}

if [ -n "${PYTHON:-}" ] && ! command -v "$PYTHON" >/dev/null; then
    die "PYTHON=$PYTHON was not found"
fi
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(wanted)" ] && python_fits; then
    exit 0
fi

if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || ! python_fits; then
    make_venv
fi
rm -f "$STAMP"
trap '[ $? -eq 0 ] || say "not finished; run ./setup.sh again, it goes on from here" >&2' EXIT
torch=$(torch_to_install)
say "installing $torch (the largest part: some minutes on a slow line)"
install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch"
say "installing dugnad and the tools its tests use"
install -e '.[dev]'
wanted >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
say "done. See it work: make demo"
