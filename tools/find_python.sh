#!/bin/sh
# Prints the path of a working Python 3.12, or what was tried and exits 2.
#
# find_python.sh [FOLDER ...]    FOLDERs replace the system folders that are searched besides PATH.
#
# Every candidate is run: a version manager's shim may be on PATH and yet refuse to start, and Debian's python3.12
# comes without the modules that make a virtual environment. Uses nothing but the shell, so that PATH may be bare.
set -eu

probe='
import os, sys
if sys.version_info[:2] != (3, 12):
    sys.exit("is Python %d.%d" % sys.version_info[:2])
try:
    import ensurepip, ssl, venv
except ImportError as error:
    sys.exit("%s (Debian and Ubuntu: install python3.12-venv)" % error)
# Not a link inside a virtual environment that may be deleted.
print(os.path.realpath(sys.executable))
'
tried=''

# Prints the path and ends the script when the candidate will do; otherwise notes why not.
try() {
    case $1 in
        */*) [ -x "$1" ] || return 0 ;;
        *) command -v "$1" >/dev/null 2>&1 || { tried="$tried
  $1: not on PATH"; return 0; } ;;
    esac
    if answer=$("$1" -c "$probe" 2>&1); then
        printf '%s\n' "${answer##*
}" # the last line: warnings may come before it
        exit 0
    fi
    first_line=${answer%%
*}
    tried="$tried
  $1: ${first_line:-does not run}"
}

if [ -n "${PYTHON:-}" ]; then
    try "$PYTHON"
    printf '%s\n' "PYTHON=$PYTHON is passed over: it is not a working Python 3.12." >&2
fi
try python3.12
try python3
try python

home=${HOME:-/nonexistent}
pyenv=${PYENV_ROOT:-$home/.pyenv}
data=${XDG_DATA_HOME:-$home/.local/share}
uv=${UV_PYTHON_INSTALL_DIR:-$data/uv/python}
for candidate in "$pyenv"/versions/3.12*/bin/python "$uv"/cpython-3.12*/bin/python3.12 \
    "$data"/mise/installs/python/3.12*/bin/python "$home"/.asdf/installs/python/3.12*/bin/python \
    "${CONDA_PREFIX:-/nonexistent}"/bin/python \
    "$home"/miniconda3/bin/python "$home"/miniconda3/envs/*/bin/python \
    "$home"/miniforge3/bin/python "$home"/miniforge3/envs/*/bin/python \
    "$home"/anaconda3/bin/python "$home"/anaconda3/envs/*/bin/python; do
    try "$candidate"
done

[ $# -gt 0 ] || set -- /usr/local/bin /usr/bin /opt/homebrew/bin /opt/python3.12/bin /opt/conda/bin
for folder in "$@"; do
    try "$folder/python3.12"
done

while IFS= read -r line; do printf "%s\n" "$line" >&2; done <<MESSAGE
error: no working Python 3.12 was found; megatron-core 0.19 needs it. Tried:$tried
Also looked for pyenv, uv, mise, asdf and conda under $home, and in: $*
Install one and run this again:
  Debian, Ubuntu 24.04    apt install python3.12 python3.12-venv
  anywhere                uv python install 3.12    or    pyenv install 3.12
or name one that is elsewhere:  PYTHON=/path/to/python3.12 make setup
MESSAGE
exit 2
