#!/bin/sh
# Names what is missing before anything is installed.
python=${1:-python3}
missing=""
need() { command -v "$1" >/dev/null 2>&1 || missing="$missing
  $1: $2"; }
need "$python" "Python 3.11 or newer (Debian: python3)"
need git "Debian: git"
need npm "fetches the emoji source (Debian: npm)"
need g++ "DeepSpeed builds an operator (Debian: g++)"
need apt-get "fetches the Debian sources of the demo data"
need dpkg-deb "unpacks them"
if command -v "$python" >/dev/null 2>&1; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || missing="$missing
  $python: is $("$python" -V 2>&1), 3.11 or newer is needed"
  "$python" -c 'import venv, ensurepip' 2>/dev/null || missing="$missing
  $python -m venv: Debian: python3-venv"
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"] + "/Python.h")')
  test -f "$header" || missing="$missing
  Python.h: Python's headers (Debian: python3-dev)"
fi
if [ -n "$missing" ]; then
  echo "cannot set up, missing:$missing" >&2
  exit 1
fi
