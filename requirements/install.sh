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
here_pip() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps --no-compile "$@"; }
# uv installs the set in a fourth of pip's time, by hard links from its cache; where it cannot, pip does it.
quick() { here_pip "$(grep '^uv==' "$lock")" && "$venv/bin/python" "$here/requirements/uv_install.py" "$@"; }
# The CPU build of torch is not in every package index; PyTorch's own one has it.
# The package by its path: an import hook, setuptools' default, would lose to a clone of its name in the directory.
torch=https://download.pytorch.org/whl/cpu
: >"$log"
{ quick -r "$lock" || quick --index "$torch" -r "$lock" || here_pip -r "$lock" \
    || here_pip --extra-index-url "$torch" -r "$lock"; } >>"$log" 2>&1 \
  && here_pip --no-build-isolation --config-settings editable_mode=compat -e "$here" >>"$log" 2>&1 \
  || { tail -n 20 "$log" >&2; echo "error: the installation failed; see $log" >&2; exit 1; }
# Every actor imports torch and vLLM; without compiled files (some environments forbid Python to write them) each import
# takes three times as long. Nobody imports the tests of packages. Files of other Python versions in some packages do
# not compile: that is no error.
"$venv/bin/python" -m compileall -q -j 0 -x '/tests?/|/pip/' "$venv"/lib/python3*/site-packages "$here/simmerge_ray" \
  >>"$log" 2>&1 || true
# The first merge would wait for the compiler otherwise.
"$venv/bin/python" -m simmerge_ray.merging.compile_loops >>"$log" 2>&1 || true
cp "$lock" "$venv/.installed"
echo "installed; activate with: source $venv/bin/activate"
