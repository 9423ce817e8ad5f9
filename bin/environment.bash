# shellcheck shell=bash
# This file is part of meas_deeplearn.
#
# Developed for the LSST Data Management System.
# This product includes software developed by the LSST Project
# (https://www.lsst.org).
# See the COPYRIGHT file at the top-level directory of this distribution
# for details of code ownership.
#
# This program is free software: you can redistribute it and/or modify
# it under the terms of the GNU General Public License as published by
# the Free Software Foundation, either version 3 of the License, or
# (at your option) any later version.
#
# This program is distributed in the hope that it will be useful,
# but WITHOUT ANY WARRANTY; without even the implied warranty of
# MERCHANTABILITY or FITNESS FOR A PARTICULAR PURPOSE.  See the
# GNU General Public License for more details.
#
# You should have received a copy of the GNU General Public License
# along with this program.  If not, see <https://www.gnu.org/licenses/>.

# Sourced by run-demo, run-tests and build-docs: leaves an environment in which
# meas_deeplearn and its test tools are installed, in the top folder of the
# checkout; the variable extras names other extras.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*"; }

die() {
    printf '\nerror: %s\ncure:  %s\n' "$1" "$2" >&2
    exit 1
}

# Run a command; if it fails, stop and say the cure, given first.
step() {
    local cure=$1
    shift
    say "$*"
    "$@" || die "'$*' failed (exit status $?)" "$cure"
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

find_python() {
    local python
    for python in python3.12 python3.13 python3.14 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python3; do
        if new_enough "$python"; then
            printf '%s\n' "$python"
            return
        fi
    done
    return 1
}

make_venv() {
    local python
    python=$(find_python) || die "no Python 3.12 or newer was found" \
        "install one (apt install python3.12-venv, pyenv install 3.12 or conda create -n py312 python=3.12), then run this again"
    step "remove .venv and try again; on Debian and Ubuntu the package python3-venv may be missing" \
        "$python" -m venv --clear .venv
}

# Install when pyproject.toml is not the one that was installed last.
install_package() {
    local extras=${extras:-test} want stamp
    stamp="$VIRTUAL_ENV/meas_deeplearn-$extras.installed"
    want="$PWD $(cksum <pyproject.toml)"
    if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
        say "already installed in $VIRTUAL_ENV"
        return
    fi
    step "read pip's message above; the packages need 8 GB of disk and a package index that pip can reach" \
        python -m pip install --disable-pip-version-check -e ".[$extras]"
    printf '%s\n' "$want" >"$stamp"
}

if [ -n "${EUPS_DIR:-}" ]; then
    [ -n "${MEAS_DEEPLEARN_DIR:-}" ] || die "EUPS is in use, but meas_deeplearn is not set up" \
        "setup -k -r ."
    say "using the LSST stack with meas_deeplearn from $MEAS_DEEPLEARN_DIR"
else
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        new_enough .venv/bin/python || make_venv
        # shellcheck disable=SC1091
        source .venv/bin/activate
    fi
    new_enough python || die "the active environment, $VIRTUAL_ENV, has no Python 3.12 or newer" \
        "deactivate it, and this script makes its own"
    install_package
fi
