#!/bin/sh
# Makes .venv in the project's root and installs the project with everything its tests need.
#
# Safe to run again at any time: does nothing when .venv is complete, carries on where an interrupted run stopped,
# and replaces a .venv whose Python does not work. pip's own settings and environment variables (proxy, certificate,
# index) apply.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
cd "$root"
python=.venv/bin/python
stamp=.venv/.setup-complete
# The folder belongs to it: an editable install points at the place where it was made.
wanted="$root $(cat pyproject.toml constraints.txt tools/setup.sh | cksum)"

venv_works() {
    "$python" -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && venv_works; then
    exit 0
fi

say() { printf '%s\n' "set-up: $*"; }
unfinished() {
    say 'did not finish. "make setup" carries on from here; the reason is above.' >&2
    exit 1
}

say "installing into $root/.venv: the first time about 5 minutes and 6 GB, most of it PyTorch."
rm -f "$stamp"
if ! venv_works; then
    base=$(sh tools/find_python.sh)
    if [ -e .venv ] || [ -L .venv ]; then
        say 'replacing .venv: it holds no working Python 3.12.'
        rm -rf .venv
    fi
    say "using $base"
    "$base" -m venv .venv || unfinished
fi

# pip writes RECORD last: without it the package was cut off half-way, though pip would take it for installed.
find .venv/lib -name '*.dist-info' -type d ! -exec test -e '{}/RECORD' ';' -prune -exec rm -rf '{}' +

# setuptools first and pinned, so that the project is built with the tested one and not with the newest.
"$python" -m pip install --disable-pip-version-check --constraint constraints.txt setuptools || unfinished
say 'after the downloads, pip unpacks for a minute or two without a word.'
"$python" -m pip install --disable-pip-version-check --constraint constraints.txt \
    --no-build-isolation --editable '.[dev,eval,gguf]' || unfinished
# Transformer Engine's Python alone (1 MB), for tests/gpu_path. Beside the environment's packages: Megatron would find it
# among them, and cannot be imported with it where its compiled part is missing.
"$python" -m pip install --disable-pip-version-check --constraint constraints.txt --quiet \
    --no-deps --upgrade --target .venv/transformer-engine transformer-engine || unfinished
"$python" -W ignore -c 'import megatron.core, torch, transformers' || unfinished

printf '%s\n' "$wanted" >"$stamp"
say 'complete.'
