#!/bin/sh
# Print the path of a Python that runs and can make virtual environments.
#
#   find_python.sh            the newest of the tested versions, else any Python >= 3.10
#   find_python.sh 3.10       that version; exits 1 without a word if it is not there
#
# Each candidate is run before it is believed: a pyenv shim on PATH, for one, may be there and fail.

probe() { # probe PATH [MAJOR.MINOR]
    "$1" -c '
import sys, venv, ensurepip
if sys.version_info < (3, 10) or sys.argv[1] not in ("", "%d.%d" % sys.version_info[:2]):
    sys.exit(1)
print(sys.executable)
' "${2:-}" 2>/dev/null
}

candidates() { # candidates [MAJOR.MINOR], one path a line
    command -v "python$1" || :
    command -v python3 || :
    # pyenv keeps itself in ROOT/bin, its shims in ROOT/shims and the Pythons in ROOT/versions
    shim=$(command -v pyenv || command -v "python$1" || :)
    for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv" "${shim:+${shim%/*}/..}"; do
        for path in "$root/versions/$1".*/bin/python; do
            [ ! -x "$path" ] || echo "$path"
        done
    done
    command -v uv >/dev/null && uv python find --no-project "${1:->=3.10}" 2>/dev/null || :
}

find_python() { # find_python [MAJOR.MINOR]
    # The list comes from a here-document, not from a pipe, so that `return` leaves the function.
    while IFS= read -r path; do
        [ -z "$path" ] || ! probe "$path" "$1" </dev/null || return 0
    done <<END
$(candidates "$1")
END
    return 1
}

if [ $# -gt 0 ]; then
    find_python "$1"
    exit
fi
for version in 3.13 3.12 3.11 3.10 ""; do
    find_python "$version" && exit
done
echo "no Python 3.10 or newer with venv was found (on Debian or Ubuntu: apt install python3-venv)" >&2
exit 1
