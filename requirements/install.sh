#!/usr/bin/env bash
# Create a virtual environment with the pinned packages and this package, editable. Usage: install.sh PYTHON VENV
# What it installs is written to VENV/.installed last, so an interrupted installation is done again.
set -euo pipefail
python=$1
venv=$2
here=$(cd "$(dirname "$0")/.." && pwd)
lock=$here/requirements/cpu.lock

"$python" - <<'PY'
import platform, sys
if not (3, 11) <= sys.version_info[:2] <= (3, 12) or (sys.platform, platform.machine()) != ("linux", "x86_64"):
    found = f"Python {sys.version.split()[0]} on {sys.platform} {platform.machine()}"
    sys.exit(f"error: the pinned set is for Python 3.11 or 3.12 on Linux x86-64, found {found}; set PYTHON=/path/to/python3.11")
PY

log=$here/$(basename "$venv")-install.log
echo "installing the pinned packages into $venv (a few minutes; details in $log)"
rm -f "$venv/.installed"
"$python" -m venv "$venv"
install() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps --no-compile "$@" >>"$log" 2>&1; }
: >"$log"
# The CPU build of torch is not in every package index; PyTorch's own one has it.
install -r "$lock" \
  || { echo "trying again with PyTorch's CPU index"; install --extra-index-url https://download.pytorch.org/whl/cpu -r "$lock"; } \
  || { tail -n 20 "$log" >&2; echo "error: the installation failed; see $log" >&2; exit 1; }
install --no-build-isolation -e "$here" || { tail -n 20 "$log" >&2; exit 1; }
# Every actor imports torch and vLLM; without compiled files (some environments forbid Python to write them) each import
# takes three times as long. Files of other Python versions in some packages do not compile: that is no error.
"$venv/bin/python" -m compileall -q -j 0 "$venv"/lib/python3*/site-packages >>"$log" 2>&1 || true
cp "$lock" "$venv/.installed"
echo "installed; activate with: source $venv/bin/activate"
