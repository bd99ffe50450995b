#!/bin/sh
# Finds a Python and checks for what no wheel brings: a C compiler, Python's headers, libgmp's headers (libp2p compiles two small modules).
# Prints the interpreter's path on stdout; on failure prints what is missing and the packages that bring it, and exits 1.
# Usage: tools/preflight.sh [PYTHON]
set -u

supported() {
    "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

find_python() {
    if [ -n "${1:-}" ]; then
        supported "$1" && command -v "$1"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null 2>&1 && supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

compiles() { # compiles HEADER [FLAGS...]: does a file that includes HEADER compile?
    header=$1
    shift
    printf '#include <%s>\nint main(void) { return 0; }\n' "$header" |
        "$compiler" "$@" ${CPPFLAGS:-} ${CFLAGS:-} -x c -fsyntax-only - >/dev/null 2>&1
}

missing=""
compiler=${CC:-cc}
python=$(find_python "${1:-}") || python=""
if [ -z "$python" ]; then
    missing="$missing python"
elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    missing="$missing venv"
fi
if ! command -v "$compiler" >/dev/null 2>&1; then
    missing="$missing compiler"
else
    if [ -n "$python" ]; then
        include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
        compiles Python.h -I"$include" || missing="$missing python-headers"
    fi
    compiles gmp.h || missing="$missing gmp-headers"
fi

if [ -z "$missing" ]; then
    echo "$python"
    exit 0
fi

exec >&2
echo "gpumarket needs some things that pip cannot install. Missing here:"
for what in $missing; do
    case $what in
    python) echo "  - Python 3.11, 3.12 or 3.13${1:+ ($1 is not one, or is not there)}; name another with make PYTHON=..." ;;
    venv) echo "  - Python's venv module" ;;
    compiler) echo "  - a C compiler ($compiler)" ;;
    python-headers) echo "  - Python's C headers (Python.h)" ;;
    gmp-headers) echo "  - libgmp's headers (gmp.h)" ;;
    esac
done
echo "Install them with one of:"
echo "  Debian, Ubuntu   apt install python3 python3-venv python3-dev gcc libgmp-dev"
echo "  Fedora           dnf install python3 python3-devel gcc gmp-devel"
echo "  macOS            xcode-select --install; brew install python@3.13 gmp"
exit 1
